"""Presentation of results: names of metrics, digits of their values, and which values are better."""

import math
from collections.abc import Sequence

from mimref.data.decode import printable
from mimref.evaluation.assess.measures import LOWER_IS_BETTER as MEASURES_LOWER
from mimref.evaluation.assess.measures import MEASURES, goodness
from mimref.evaluation.assess.verdicts import NAMES
from mimref.results import Row

# Label-free measures of single blocks; drawn as curves.
_OF_BLOCKS = NAMES | {"knn_leave_one_out": "k-NN, leaving one out"}
LABELS = (
    NAMES
    | {f"block_{name}": f"{label} of block {{block}}" for name, label in _OF_BLOCKS.items()}
    | {
        "knn_top1": "k-NN top-1",
        "knn_top5": "k-NN top-5",
        "retrieval_map": "retrieval mAP",
        "retrieval_map_at_r": "retrieval MAP@R",
        "retrieval_recall": "recall@{k}",
        "lowshot_top1": "{shots}-shot top-1",
        "probe_top1": "linear probe top-1",
        "attentive_top1": "attentive probe top-1",
        "finetune_top1": "fine-tuned top-1",
        "finetune_top5": "fine-tuned top-5",
        "cluster_acc": "k-means ACC",
        "cluster_nmi": "k-means NMI",
        "cluster_ami": "k-means AMI",
        "cluster_ari": "k-means ARI",
        "silhouette": "silhouette",
        "davies_bouldin": "Davies-Bouldin",
        "cluster_silhouette": "silhouette of the clusters",
        "cluster_davies_bouldin": "Davies-Bouldin of the clusters",
        "clean_top1": "clean top-1",
        "robust_top1": "top-1",
        "robust_mean_top1": "mean top-1 of {corruptions} corruptions",
        "robust_mce": "mCE of {corruptions} corruptions",
        "robust_drop": "relative drop, {corruptions} corruptions",
        "block_knn_top1": "k-NN top-1 of block {block}",
        "head_knn_top1": "k-NN top-1",
        "head_nn_accuracy": "neighbours of the same class",
        "block_knn_delta": "k-NN gained by block {block}",
        "block_mean": "mean of block {block}",
        "block_variance": "variance of block {block}",
        "block_reconstruction": "reconstruction loss of block {block}",
        "block_reconstruction_delta": "reconstruction gained by block {block}",
        "suite_average": "average",
        "suite_rank": "average rank",
        "knn_leave_one_out": "k-NN, leaving one out",
        "assessed_rank": "rank by {by}",
        "segment_miou": "mean IoU",
        "segment_micro_iou": "micro IoU",
        "segment_accuracy": "pixel accuracy",
        "segment_iou": "IoU",
        "block_segment_miou": "mean IoU of block {block}",
        "block_segment_micro_iou": "micro IoU of block {block}",
        "block_segment_accuracy": "pixel accuracy of block {block}",
    }
)
UNDEFINED = "undefined: the features do not vary, or classes have the same mean"
_SMALL = {"davies_bouldin", "cluster_davies_bouldin", "block_reconstruction"}
LOWER_IS_BETTER = _SMALL | {
    *("suite_rank", "robust_mce", "robust_drop", "assessed_rank"),
    *MEASURES_LOWER,
    *(f"block_{name}" for name in MEASURES_LOWER),
}
# Metrics that are not percentages and have no fixed scale.
STATISTICS = {
    *("feature_variance", "effective_rank", "block_mean", "block_variance", "block_effective_rank"),
    *("block_knn_delta", "block_reconstruction_delta"),
    *("rankme", "lidar", "alpha_req", "correlation_rank", "uniformity", "hubness", "assessed_rank"),
    *("block_rankme", "block_lidar", "block_alpha_req", "block_correlation_rank", "block_uniformity", "block_hubness"),
}
# Columns that hold results, as opposed to settings.
_MEASURED = ("model", "metric", "value", "mean", "std", "splits", "runs")
# Follow from the encoder, so they distinguish rows of one model only: an encoder without CLS token has another pooling.
_OF_MODEL = ("pool", "dimensions")
# Settings chosen by the measurement itself: those of the best classifier in a grid, and the best epoch.
_CHOSEN = {
    "probe_top1": ("blocks", "pool", "lr", "held_out_top1"),
    "attentive_top1": ("blocks", "pool", "queries", "lr", "held_out_top1"),
    "finetune_top1": ("epoch",),
    "finetune_top5": ("epoch",),
} | dict.fromkeys(("segment_miou", "segment_micro_iou", "segment_accuracy"), ("blocks", "pool", "lr"))


def template(row: Row) -> str:
    """Return a metric's name, with placeholders in braces for the settings that it mentions."""
    return LABELS.get(str(row["metric"]), str(row["metric"]))


def metric_label(row: Row, among: Sequence[Row] = ()) -> str:
    """Return a metric's name, with the settings that distinguish the row from rows of the same metric in `among`."""
    name = template(row)
    same = [other for other in among if other["metric"] == row["metric"]]
    varying = [
        f"{key} = {format_setting(value)}"
        for key, value in row.items()
        if key not in (*_MEASURED, *_CHOSEN.get(str(row["metric"]), ()))
        and f"{{{key}}}" not in name
        # A setting that the other row lacks distinguishes nothing: raw pixels have no blocks.
        and any(
            other.get(key, value) != value
            for other in same
            if key not in _OF_MODEL or other.get("model") == row.get("model")
        )
    ]
    unknown = {"shots": "?", "block": "?", "corruptions": "?"}
    label = name.format_map(unknown | row) if row["metric"] in LABELS else name
    return f"{label} ({', '.join(varying)})" if varying else label


def sign(row: Row) -> int:
    """Return 1 if larger values of the metric are better, else -1."""
    return -1 if row["metric"] in LOWER_IS_BETTER else 1


def merit(row: Row, value: float) -> float:
    """Return the metric's value, mapped so that higher is better, as `mimref.evaluation.assess.measures.goodness`."""
    measure = str(row["metric"]).removeprefix("block_")
    return goodness(measure, value) if measure in MEASURES else sign(row) * value


def decimals(row: Row) -> int:
    """Return the number of decimals that a table shows."""
    return 3 if row["metric"] in _SMALL else 1


def shown_value(row: Row) -> float:
    """Return the value rounded as in tables, so that equal-looking values are equal. Undefined values are the worst."""
    if is_undefined(row):
        return -sign(row) * math.inf
    value = float(row["value"])
    return float(f"{value:.4g}") if row["metric"] in STATISTICS else round(value, decimals(row))


def is_undefined(row: Row) -> bool:
    """Return whether the metric is undefined on these features."""
    return math.isnan(float(row["value"]))


def format_value(row: Row, *, spread: bool = True) -> str:
    """Format the value, with its standard deviation over repetitions if it has one."""
    if is_undefined(row):
        return "undefined"
    digits = decimals(row)
    text = f"{float(row['value']):{'.4g' if row['metric'] in STATISTICS else f'.{digits}f'}}"
    if "std" not in row or not spread:
        return text
    deviation = f"± {float(row['std']):.{digits}f}"
    # The value of a clustering is that of its best run; the deviation belongs to the mean.
    is_mean = row.get("mean", row["value"]) == row["value"]
    return f"{text} {deviation}" if is_mean else f"{text} (mean {float(row['mean']):.{digits}f} {deviation})"


def spread_legend(rows: Sequence[Row]) -> str:
    """Return what `±` means in the values of rows, such as `± standard deviation of 20 draws`; empty without any."""
    if not any("std" in row for row in rows):
        return ""
    counts = {
        f"{row[key]} {word}" for row in rows for key, word in (("splits", "draws"), ("runs", "runs")) if key in row
    }
    return f"± standard deviation{' of ' * bool(counts)}{', '.join(sorted(counts))}"


def format_setting(value: str | int | float) -> str:
    """Format a setting's value: floats without trailing zeros, names with escaped control characters."""
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def short_name(text: str, length: int) -> str:
    """Return a name on one line, with odd characters escaped and its middle omitted if it is too long."""
    text = printable(" ".join(text.split()))
    half = length // 2
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"


def scores_line(rows: Sequence[Row]) -> str:
    """Return `ACC 95.3   NMI 92.2`, the line under a clustering's figure, for the last blocks in the rows."""
    last = {template(row).removeprefix("k-means "): row for row in rows}
    return "   ".join(f"{name} {format_value(row, spread=False)}" for name, row in last.items())


_SUMMARIES = ("suite_average", "suite_rank")


def suite_base(rows: Sequence[Row]) -> str:
    """Return the first encoder of `run_suite`, even if it lacks the first entry: averages are in order."""
    averaged = [row for row in rows if row["metric"] == _SUMMARIES[0]]
    return str((averaged or rows)[0]["model"])


def suite_lines(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `run_suite` for comparison tables and figures: every entry becomes a metric of its name."""
    kept = ("model", "value", "mean", "std")
    return [
        {key: row[key] for key in kept if key in row} | {"metric": row.get("entry", row["metric"])}
        for row in sorted(rows, key=lambda row: row["metric"] in _SUMMARIES)
    ]
