"""Result rows from the accuracy on every set: means over corruptions, mCE, and the drop from clean images."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from mimref.results import Row
from mimref.transfer.finetune.classify import Scores
from mimref.transfer.robustness.corruptions import ALEXNET_ERRORS, CORRUPTIONS, COUNTS, IMAGENET_C, SEVERITIES


def score_rows(scored: Sequence[tuple[Row, Scores]]) -> list[Row]:
    """Return rows in percent, means first.

    scored: the columns that identify each set, and its accuracy. Rows, in this order: `clean_top1`; for every corrupted
    `set`, `robust_mean_top1`, the plain mean over `corruptions` corruptions, each averaged over its severities, and
    `robust_mce` (ImageNet-C) or `robust_drop` (others: the share of the clean accuracy that is lost); `robust_top1` of
    every other `set`, of every `corruption`, and of every `severity`. If not all five severities were measured,
    `severities` lists them.
    """
    rows: list[Row] = [{**where, "value": scores.top1, "images": scores.images} for where, scores in scored]
    clean = [row for row in rows if row["metric"] == "clean_top1"]
    plain = [row for row in rows if row["metric"] != "clean_top1" and "corruption" not in row]
    details = [row for row in rows if "corruption" in row]
    means: list[Row] = []
    averages: list[Row] = []
    for name in dict.fromkeys(str(row["set"]) for row in details):
        of_set = [row for row in details if row["set"] == name]
        found = {each: [row for row in of_set if row["corruption"] == each] for each in CORRUPTIONS}
        levels = sorted({int(row["severity"]) for row in of_set})
        chosen: Row = {} if tuple(levels) == SEVERITIES else {"severities": ",".join(map(str, levels))}
        top1 = {each: fmean(float(row["value"]) for row in found[each]) for each in CORRUPTIONS if found[each]}
        means += _means(name, top1, float(clean[0]["value"]) if clean else 0.0, chosen)
        for each, value in top1.items():
            averages.append({"metric": "robust_top1", "value": value, "set": name, "corruption": each, **chosen})
    return [*clean, *means, *plain, *averages, *details]


def _means(name: str, top1: Mapping[str, float], clean: float, chosen: Row) -> list[Row]:
    """Return the means of one set over its corruptions; ImageNet-C's are over all 15 or 19, or marked incomplete."""
    is_official = name == IMAGENET_C
    groups = [CORRUPTIONS[:count] for count in COUNTS if top1.keys() >= set(CORRUPTIONS[:count])]
    if is_official and not groups:
        name = f"{name}, incomplete"
    if not groups or (not is_official and tuple(top1) not in groups):
        groups.append(tuple(top1))
    rows: list[Row] = []
    for names in groups:
        common: Row = {"set": name, "corruptions": len(names), **chosen}
        mean = fmean(top1[each] for each in names)
        rows.append({"metric": "robust_mean_top1", "value": mean, **common})
        if name == IMAGENET_C:
            errors = [100 * (100 - top1[each]) / ALEXNET_ERRORS[each] for each in names]
            rows.append({"metric": "robust_mce", "value": fmean(errors), **common})
        elif clean and not is_official:
            rows.append({"metric": "robust_drop", "value": 100 * (clean - mean) / clean, **common})
    return rows
