"""`mimref segment`: segmentation from frozen patch tokens."""

from functools import partial

from mimref.cli.execution import drop_state, figure, print_finished, report, run_on_ranks, write_page
from mimref.cli.options import ARCH, CHECKPOINT, PART, SOURCE, WORKERS, Data, Preset, Report, Resume, Seed, Text
from mimref.cli.parser import argument, option


class Masks(Data, panel="Data"):
    data: Text = option(
        "A folder of images/ and masks/, ADE20K or Pascal VOC, hf:FOLDER, hf:NAME; mosaics of digits or fashion-mnist.",
        "SPEC",
        "data.spec",
    )
    workers: Text = WORKERS


class SegmentEncoder(Masks, panel="Encoder"):
    arch: Text = ARCH
    source: Text = SOURCE
    encoder: Text = PART
    blocks: Text = option("Score blocks one by one instead; 0 is raw pixels.", "all|1,5,12|0,all", "blocks")
    resolution: Text = option("Size of crops and windows; default: the protocol's.", "PIXELS", "resolution")


class SegmentOptions(SegmentEncoder, Preset, Seed, Report, Resume, panel="Protocol"):
    checkpoint: Text = argument(
        f"{CHECKPOINT}; default: the packaged tiny encoder, on mosaics of digits.", "CKPT", "checkpoint", required=False
    )
    protocol: Text = option("Default paper.", "paper|dinov2|knn", "protocol")
    test: Text = option("Middle square, or sliding windows over resized or full images.", "crop|slide|full", "test")
    upsampling: Text = option("Upsampling to pixels; default bilinear.", "bilinear|nearest", "training.upsampling")
    epochs: Text = option("Passes over the training images.", "N", "training.epochs")
    updates: Text = option("Number of updates, instead of epochs.", "N", "training.updates")
    batch_size: Text = option("Images per update.", "N", "training.batch_size")
    k: Text = option("Patches that vote, with --protocol knn; default 30.", "K", "knn.k")
    final_norm: bool | None = option(
        "Apply the final norm; default: the protocol's.", sets="final_norm", flag="--final-norm/--no-final-norm"
    )


def segment(options: SegmentOptions) -> None:
    """Segment images from the frozen encoder's patch tokens.

    Trains linear heads by the paper's or DINOv2's protocol, or runs patch k-NN without training. With --out, writes a
    table per class and a figure of predictions, and --resume continues interrupted training.

    Examples:
      mimref segment
      mimref segment runs/mae_l16 --protocol knn --data /data/ade20k --out runs/segment
    """
    from mimref.transfer.segment.config import SegmentConfig

    if options.given("training.epochs") is not None and options.given("training.updates") is None:
        # A preset's number of updates would take precedence.
        options.sets = ["training.updates=none", *(options.sets or ())]
    preset = options.preset or (None if options.checkpoint else "quickstart")
    if preset in ("quickstart", "segment/quickstart") and options.given("protocol") == "dinov2":
        # The preset's rates are for the paper's protocol.
        options.sets = ["training.lr=0.001", "training.block_lr=0.001", *(options.sets or ())]
    config = options.load(SegmentConfig, preset)
    if print_finished(options.out, config.command, options):
        return
    options.check_out()
    state = options.checks.run("out", lambda: options.state_file("segment"))

    from mimref.transfer.segment.run import evaluate_segment

    work = partial(evaluate_segment, state=state, fresh=not options.resume)
    result = run_on_ranks(config, options, work, advice="run it again without torchrun")
    if result is None:
        return
    if config.blocks is None:
        report(options, config, result)
    else:
        from mimref.reports.terminal import print_blocks

        report(options, config, result, partial(print_blocks, heads={}))
    if state is not None:
        drop_state(state)
    if options.out is None:
        return
    with figure(options.out / "segments.png", options):
        from mimref.reports.figures import plot_segments

        shown = [(sample.image, sample.truth, sample.predicted_K[0]) for sample in result.samples]
        plot_segments(options.out / "segments.png", shown, result.class_names)
    if config.blocks is not None:
        with figure(options.out / "blocks.png", options):
            from mimref.reports.figures import plot_blocks

            plot_blocks(options.out / "blocks.png", result.rows, heads={})
    write_page(options.out, options)
