"""`mimref robustness`."""

from mimref.cli.execution import figure, report, run_on_ranks, write_page
from mimref.cli.options import Images, Report, Seed, Text
from mimref.cli.parser import argument, option


class RobustnessOptions(Images, Seed, Report, panel="Data"):
    checkpoint: str = argument("Weights file or output folder of `finetune`.", "CKPT", "checkpoint")
    imagenet_c: Text = option("ImageNet-C: folders CORRUPTION/SEVERITY/CLASS.", "DIR", "imagenet_c")
    imagenet_a: Text = option("ImageNet-A (200 classes).", "DIR", "imagenet_a")
    imagenet_r: Text = option("ImageNet-R (200 classes).", "DIR", "imagenet_r")
    sketch: Text = option("ImageNet-Sketch.", "DIR", "sketch")
    shifted: list[str] | None = option("Any other test set of the classifier's classes; repeatable.", "SPEC", "shifted")
    subset: bool | None = option(
        "Let only the classes of a --shifted set compete; default on.", sets="subset", flag="--subset/--no-subset"
    )
    corrupt: Text = option("Corrupt the --data images by 15, 19 or the named corruptions.", "15|19|NAMES", "corrupt")
    severities: Text = option("Severities of the corruptions; default 1,2,3,4,5.", "1,3,5", "severities")
    resolution: Text = option("Image size; default: as in fine-tuning.", "PIXELS", "resolution")


def robustness(options: RobustnessOptions) -> None:
    """Classify corrupted and shifted images with a fine-tuned encoder.

    Evaluates on ImageNet's robustness sets, on other folders with the same classes, or on your own images, corrupted as
    they are read. Clean accuracy is measured on --data; default: the images of the fine-tuning.

    Examples:
      mimref robustness runs/finetuned --imagenet-c /data/imagenet-c --imagenet-a /data/imagenet-a
      mimref robustness runs/finetuned --data /data/my_images --corrupt 15 --out runs/robustness
    """
    from mimref.transfer.robustness.config import RobustnessConfig

    config = options.load(RobustnessConfig)
    options.check_out()

    from mimref.transfer.robustness.protocol import evaluate_robustness

    result = run_on_ranks(config, options, evaluate_robustness)
    report(options, config, result)
    if result is not None and options.out is not None:
        with figure(options.out / "robustness.png", options):
            from mimref.reports.figures import plot_robustness

            plot_robustness(options.out / "robustness.png", result.rows)
        write_page(options.out, options)
