"""Commands that evaluate encoders, and the one that writes their features."""

from functools import partial
from pathlib import Path

from mimref.cli.execution import drop_state, figure, gallery, note, print_finished, report, run_on_ranks, write_page
from mimref.cli.options import (
    BATCH_SIZE,
    CHECKPOINT,
    Blocks,
    Clustering,
    Draws,
    EncoderPass,
    FinalNorm,
    Force,
    Output,
    Pool,
    Preset,
    Report,
    Resume,
    Seed,
    Split,
    Subject,
    Text,
)
from mimref.cli.parser import argument, option
from mimref.files import check_new_file


class KnnOptions(Subject, EncoderPass, Blocks, Output, panel="Protocol"):
    k: Text = option("Neighbours that vote; default 10.", "10,20", "k")
    tau: Text = option("Temperatures of the votes; default 0.07.", "0.07,0.1", "tau")
    standardize: bool | None = option(
        "Scale every feature first; default on.", sets="standardize", flag="--standardize/--no-standardize"
    )
    per_class: bool | None = option("Also report every class.", sets="per_class")
    retrieval: bool | None = option("Also report retrieval: mAP, MAP@R, and recall@1, 5 and 10.", sets="retrieval")


def knn(options: KnnOptions) -> None:
    """Classify images by their nearest neighbours.

    The training images vote on every validation image.

    Examples:
      mimref knn
      mimref knn runs/mae_l16 --k 1,10,20 --tau 0.07 --blocks all --per-class
      mimref knn runs/mae_l16 --retrieval --set recall_at=1,10,100
    """
    from mimref.evaluation.knn.config import KnnConfig

    config = options.load(KnnConfig)
    options.check_out()

    from mimref.evaluation.knn.protocol import evaluate_knn

    report(options, config, run_on_ranks(config, options, evaluate_knn))


class LowshotOptions(Subject, EncoderPass, Blocks, Draws, Seed, Output, panel="Protocol"):
    split_files: list[str] | None = option(
        "File that names training images, one per line; repeatable.", "FILE", "split_files", flag="--split-file"
    )


def lowshot(options: LowshotOptions) -> None:
    """Classify images from a few labelled examples per class.

    Logistic regression on randomly drawn images, or on those named in files.

    Examples:
      mimref lowshot --shots 1,5
      mimref lowshot runs/mae_l16 --split-file 1shot_0.txt --split-file 1shot_1.txt
    """
    from mimref.evaluation.lowshot.config import LowshotConfig

    config = options.load(LowshotConfig)
    options.check_out()

    from mimref.evaluation.lowshot.protocol import evaluate_lowshot

    report(options, config, run_on_ranks(config, options, evaluate_lowshot))


class ClusterOptions(Subject, EncoderPass, Blocks, Split, Clustering, Seed, Report, panel="Protocol"):
    clusters: Text = option("Default: the number of classes. Required for images without labels.", "N", "clusters")
    classes: Text = option("Only these classes, or those named in a file.", "NAMES|FILE", "classes")
    umap: Path | None = option("Draw the images as points, coloured by class or by cluster.", "FILE.png")


def cluster(options: ClusterOptions) -> None:
    """Cluster images, with or without labels, and compare the clusters with the classes.

    Runs mini-batch k-means and reports the run with the lowest inertia and the mean of all runs. With --out, writes the
    cluster of every image and a gallery of central and outlying images.

    Examples:
      mimref cluster --metrics acc,nmi
      mimref cluster runs/mae_l16 --classes food.txt --umap food.png
      mimref cluster runs/mae_l16 --data /data/my_images --clusters 30 --out runs/clusters
    """
    from mimref.evaluation.cluster.config import ClusterConfig

    config, umap = options.load(ClusterConfig), options.umap
    options.check_out()
    if umap is not None:
        options.checks.run("umap", lambda: check_new_file(umap, (".png",), options.force, option="--umap"))

    from mimref.evaluation.cluster.protocol import evaluate_cluster

    work = partial(evaluate_cluster, embed=umap is not None, assigned=options.out is not None, exhibits=options.reports)
    found = run_on_ranks(config, options, work)
    if found is None:
        return
    result, last = found
    report(options, config, result)
    if options.out is not None and result.assignment is not None:
        from mimref.files import write_bytes
        from mimref.reports.galleries import cluster_notes, cluster_strips

        write_bytes(options.out / "assignments.csv", result.assignment.table())
        strips, notes = cluster_strips(result.assignment), cluster_notes(result.assignment)
        gallery(options.out, "Clusters", strips, notes, options)
    write_page(options.out, options)
    if last is None or umap is None:
        return
    with figure(umap, options) as terminal:
        from mimref.evaluation.cluster.embedding import umap_embedding
        from mimref.reports.figures import plot_embedding
        from mimref.reports.metrics import scores_line

        title, caption = str(result.rows[0]["model"]), scores_line(result.rows)
        terminal.progress("UMAP", 0, 1)
        points = umap_embedding(last.x, seed=config.seed)
        terminal.progress("UMAP", 1, 1)
        plot_embedding(umap, points, last.y, last.class_names, title=title, caption=caption)


class ProbeOptions(Subject, EncoderPass, Preset, Seed, Resume, panel="Protocol"):
    kind: Text = option(
        "attentive: learned queries pool the patch tokens; default linear.", "linear|attentive", "probe.kind"
    )
    cached: bool | None = option("Train on cached features of centre crops, which is many times faster.", sets="cached")
    epochs: Text = option("Passes over the images.", "N", "probe.epochs")
    batch_size: Text = option(BATCH_SIZE, "N", "probe.batch_size")
    select: Text = option("Images used to choose the best classifier; default test.", "test|val-split", "probe.select")
    final_norm: bool | None = option(
        "Apply the encoder's final norm; default on.", sets="final_norm", flag="--final-norm/--no-final-norm"
    )


def probe(options: ProbeOptions) -> None:
    """Train classifiers on the frozen encoder.

    Linear probes follow DINOv2's protocol: a grid of classifiers is trained, and the best one counts. Attentive probes
    pool the patch tokens first. With --out, --resume continues an interrupted probe.

    Examples:
      mimref probe --cached
      mimref probe runs/mae_l16 --out runs/probe
      mimref probe --preset attentive_quickstart
      mimref probe runs/mae_l16 --kind attentive --set probe.tokens=cls+patch
    """
    from mimref.evaluation.probe.config import ProbeConfig

    config = options.load(ProbeConfig, options.preset)
    if print_finished(options.out, config.command, options):
        return
    options.check_out()
    state = options.checks.run("out", lambda: options.state_file("probe"))

    from mimref.evaluation.probe.protocol import evaluate_probe

    advice = "--resume continues the probe" if state else "run it again; with --out, --resume can continue it"
    work = partial(evaluate_probe, state=state, fresh=not options.resume)
    result = run_on_ranks(config, options, work, advice=advice)
    report(options, config, result)
    if result is not None and state is not None:
        drop_state(state)


class BlocksOptions(EncoderPass, Pool, Preset, Seed, Report, panel="Protocol"):
    checkpoints: list[str] | None = argument(
        f"{CHECKPOINT}; several are compared.", "CKPT", "checkpoints", required=False
    )
    k: Text = option("Neighbours that vote; default 10.", "K", "k")
    tau: Text = option("Temperature of the votes; default 0.07.", "T", "tau")
    reconstruction: bool | None = option("Also train a light decoder on every block (Fig. 6).", sets="reconstruct")


def analyze_blocks(options: BlocksOptions) -> None:
    """Score every block and recommend blocks for the heads.

    Reports k-NN accuracy and feature statistics per block; with --out, also draws a figure. Without CKPT, scores the
    packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref analyze-blocks
      mimref analyze-blocks mae_l16 runs/mae_l16 --data /data/imagenet --out runs/blocks
    """
    from mimref.evaluation.blocks.config import BlocksConfig

    config = options.load(BlocksConfig, options.preset or (None if options.checkpoints else "quickstart"))
    options.check_out()

    from mimref.evaluation.blocks.protocol import evaluate_blocks
    from mimref.reports.terminal import print_blocks

    result = run_on_ranks(config, options, partial(evaluate_blocks, exhibits=options.reports))
    if result is None:
        return
    report(options, config, result, partial(print_blocks, heads=result.heads))
    if options.out is not None:
        with figure(options.out / "blocks.png", options):
            from mimref.reports.figures import plot_blocks

            plot_blocks(options.out / "blocks.png", result.rows, heads=result.heads)
    write_page(options.out, options)


class AssessOptions(EncoderPass, Blocks, Preset, Seed, Report, panel="Protocol"):
    checkpoints: list[str] | None = argument(
        f"{CHECKPOINT}; several are ranked together.", "CKPT", "checkpoints", required=False
    )
    measure: Text = option(
        "Measure to rank by; default neighbour_consistency.",
        "rankme|lidar|alpha_req|effective_rank|correlation_rank|uniformity|neighbour_consistency|view_retrieval|hubness",
        "measure",
    )
    split: Text = option("Images to use; default train.", "train|val", "split")
    images: Text = option("Maximum number of images to use; default 5000.", "N", "images")
    k: Text = option("Neighbours per image; default 10.", "K", "k")


def assess(options: AssessOptions) -> None:
    """Rank encoders or blocks without labels.

    Measures how features are spread, and whether two augmented views of an image stay neighbours. Without CKPT,
    measures the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref assess --blocks all
      mimref assess mae_l16 runs/mae_l16 --data /data/my_images --out runs/assessed
    """
    from mimref.evaluation.assess.config import AssessConfig

    config = options.load(AssessConfig, options.preset or (None if options.checkpoints else "quickstart"))
    options.check_out()

    from mimref.evaluation.assess.protocol import assess as assess_encoders
    from mimref.reports.assessment import plot_assessment, print_assessment

    result = run_on_ranks(config, options, assess_encoders)
    if result is None:
        return
    report(options, config, result, partial(print_assessment, verdicts=result.verdicts))
    if options.out is not None and len(result.verdicts) > 1:
        with figure(options.out / "assessment.png", options):
            plot_assessment(options.out / "assessment.png", result.rows)
    write_page(options.out, options)


class CompareOptions(EncoderPass, Pool, FinalNorm, Draws, Clustering, Seed, Report, panel="Protocol"):
    base: str = argument("Weights before refining: a file or a run's folder.", "BASE", "base")
    refined: list[str] = argument("Weights to compare with BASE.", "REFINED", "refined")
    protocols: Text = option("Protocols to run; default knn,lowshot,cluster.", "knn,lowshot,cluster,probe", "protocols")


def compare(options: CompareOptions) -> None:
    """Compare encoders with the same protocols.

    With --out, writes a table as CSV, JSON and Markdown, and a figure.

    Examples:
      mimref compare quickstart runs/refine-quickstart
      mimref compare mae_l16 runs/mae_l16 --data /data/imagenet --out runs/compared
    """
    from mimref.evaluation.config import CompareConfig

    config = options.load(CompareConfig)
    options.check_out()

    from mimref.evaluation.compare import compare_encoders
    from mimref.reports.terminal import print_comparison

    result = run_on_ranks(config, options, partial(compare_encoders, exhibits=options.reports))
    if result is None:
        return
    first = str(result.rows[0]["model"])
    report(options, config, result, partial(print_comparison, base=first))
    if options.out is not None:
        from mimref.files import write_bytes
        from mimref.reports.tables import markdown_table

        write_bytes(options.out / "results.md", markdown_table(result.rows, first).encode())
        with figure(options.out / "comparison.png", options):
            from mimref.reports.figures import plot_comparison

            plot_comparison(options.out / "comparison.png", result.rows, first)
    write_page(options.out, options)


class SearchOptions(EncoderPass, Blocks, Output, panel="Protocol"):
    checkpoint: Text = argument(
        f"{CHECKPOINT}; default: the packaged tiny encoder, on digits. Must come before --query.",
        "CKPT",
        "checkpoint",
        required=False,
    )
    queries: list[str] | None = option(
        "Image files, or names of images in the data, as results show them.", "IMAGE...", "queries", flag="--query"
    )
    k: Text = option("Nearest images per query; default 12.", "K", "k")
    split: Text = option("Images to search; default all.", "train|val|all", "split")
    standardize: bool | None = option(
        "Scale every feature first; default on.", sets="standardize", flag="--standardize/--no-standardize"
    )


def search(options: SearchOptions) -> None:
    """Find the images of a data set that are most similar to query images.

    The search is exact: every query is compared with every image by cosine similarity. Images need no labels. With
    --out, writes a table as CSV and JSON, and a gallery as PNG and HTML.

    Examples:
      mimref search --query digits/val/21 digits/val/24 --k 5
      mimref search runs/mae_l16 --data /data/my_images --query cat.jpg dog.jpg --out runs/found
    """
    from mimref.evaluation.search.config import SearchConfig

    config = options.load(SearchConfig)
    options.check_out()

    from mimref.evaluation.search.protocol import search as run_search
    from mimref.reports.terminal import print_found

    result = run_on_ranks(config, options, partial(run_search, pictures=options.out is not None))
    report(options, config, result, print_found)
    if result is not None and options.out is not None and result.pictures:
        from mimref.reports.galleries import search_notes, search_strips

        gallery(options.out, "Nearest images", search_strips(result), search_notes(result), options)


class ExtractOptions(EncoderPass, Blocks, Force, panel="Output"):
    checkpoint: str = argument(f"{CHECKPOINT}.", "CKPT", "checkpoint")
    split: Text = option("Images to use; default val.", "train|val|all", "split")
    out: Path = option("File to write.", "FILE.npz|FILE.parquet|FILE.lance", required=True)


def extract(options: ExtractOptions) -> None:
    """Write features to a file for other programs.

    An .npz file holds arrays in the order of the images. A .parquet or .lance table, ready for a vector database, has
    one row per image with its path, split, label and vector.

    Examples:
      mimref extract quickstart --out features.npz
      mimref extract runs/mae_l16 --data /data/my_images --split all --out features.lance
    """
    from mimref.features.config import ExtractConfig

    config = options.load(ExtractConfig)

    from mimref.features.extraction import extract_to_file

    shape = run_on_ranks(config, options, partial(extract_to_file, out=options.out, force=options.force))
    if shape is not None:
        note(f"features {' x '.join(map(str, shape))} in {options.out}", options)
