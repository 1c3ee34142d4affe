"""Check that the suite notices faults: change one line of the method at a time and run the tests that must then fail.

    python tests/mutate.py               # all mutations: a few minutes on two cores
    python tests/mutate.py ema queue     # those whose name contains one of the words

Works on a copy of the package and its tests in a temporary folder. Exits with 1 if the tests pass in spite of a
mutation, if they fail without one, or if a line to change does not occur exactly once any more: adapt `MUTATIONS`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that it did not run the tests


@dataclass(frozen=True)
class Mutation:
    """A fault to plant in `file`: `old` becomes `new`. `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Plant the fault below `root`. Raises ValueError unless `old` occurs exactly once."""
        path = root / "mimref" / self.file
        text = path.read_text("utf-8") if path.exists() else ""
        if text.count(self.old) != 1:
            raise ValueError(f"{text.count(self.old)} times in mimref/{self.file}: {self.old!r}; adapt tests/mutate.py")
        path.write_text(text.replace(self.old, self.new), "utf-8")


MUTATIONS = (
    Mutation(
        "the loss pushes positives away",
        "refinement/alignment.py",
        "logsumexp(dim=-1 if by_prediction else -2) - positive_HPB",
        "logsumexp(dim=-1 if by_prediction else -2) + positive_HPB",
        ("test_refinement_loss.py",),
    ),
    Mutation(
        "negatives get a gradient",
        "refinement/alignment.py",
        "negative_HGBO[:, g].detach().transpose(1, 2)",
        "negative_HGBO[:, g].transpose(1, 2)",
        ("test_refinement_loss.py",),
    ),
    Mutation(
        "the queue skips a row",
        "refinement/alignment.py",
        "self.position = (self.position + count) % len(self)",
        "self.position = (self.position + count + 1) % len(self)",
        ("test_refinement_queue.py",),
    ),
    Mutation(
        "a sample finds its own row in the queue",
        "refinement/alignment.py",
        "similarity_HMQ.masked_fill_(sample_M[:, None] == self.sample_Q, -torch.inf)",
        "pass",
        ("test_refinement_queue.py",),
    ),
    Mutation(
        "heads read the block before theirs",
        "refinement/method.py",
        "[self.wanted.index(block) for block in blocks]",
        "[self.wanted.index(block) - 1 for block in blocks]",
        ("test_refinement_method.py",),
    ),
    Mutation(
        "a resumed stage forgets the queue",
        "refinement/stages.py",
        'self.method.queue.load_state_dict(state["queue"])',
        "pass",
        ("test_refinement_run.py",),
    ),
    Mutation(
        "the weight average (ema) moves the wrong way round",
        "training/ema.py",
        "self._weights, 1 - self.decay)",
        "self._weights, self.decay)",
        ("test_training_ema.py",),
    ),
    Mutation(
        "the warm-up starts a step late",
        "training/optim.py",
        "peak * (update + 1) / (warmup_updates + 1)",
        "peak * update / (warmup_updates + 1)",
        ("test_training_optim.py",),
    ),
    Mutation(
        "layer decay counts blocks from the one before",
        "encoders/parameters.py",
        "return int(block[1]) + 1",
        "return int(block[1])",
        ("test_encoders_parameters.py",),
    ),
    Mutation(
        "far k-NN neighbours weigh more than near ones",
        "evaluation/knn/protocol.py",
        "/ tau_).exp()",
        "/ -tau_).exp()",
        ("test_evaluation_knn.py",),
    ),
    Mutation(
        "micro-batches lose the gradients of the first images",
        "refinement/method.py",
        "[x_VBD[:, rows] for x_VBD in gradients_VBD])",
        "[x_VBD[:, rows] * (rows.start > 0) for x_VBD in gradients_VBD])",
        ("test_refinement_micro_batch.py",),
    ),
    Mutation(
        "mixup gives the share of an image to its partner",
        "transfer/finetune/augment.py",
        "return self.share * own + (1 - self.share) * other",
        "return (1 - self.share) * own + self.share * other",
        ("test_transfer_finetune_augment.py",),
    ),
    Mutation(
        "stochastic depth does not scale what is left",
        "encoders/classifier.py",
        "keep_B = (self.uniform_B >= self.rate).to(branch_BLD.dtype) / (1 - self.rate)",
        "keep_B = (self.uniform_B >= self.rate).to(branch_BLD.dtype)",
        ("test_encoders_classifier.py",),
    ),
    Mutation(
        "equal results do not share their rank",
        "transfer/suite/ranks.py",
        'method="average"',
        'method="dense"',
        ("test_transfer_ranks.py",),
    ),
)


def copy_project(folder: Path) -> Path:
    """Copy what the tests need to `folder`, and return it."""
    for name in ("mimref", "tests", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(root: Path, tests: list[str]) -> tuple[int, str]:
    """Run test files of the copy up to the first failure; return pytest's exit code and output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(f"tests/{name}" for name in tests),
    ]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def notices(mutation: Mutation) -> bool:
    """Return whether the tests fail with the fault planted. Raises ValueError if it cannot be planted or tested."""
    with tempfile.TemporaryDirectory() as folder:
        root = copy_project(Path(folder))
        mutation.apply(root)
        code, output = run_tests(root, list(mutation.tests))
    if code not in (PASSED, FAILED):
        raise ValueError(f"pytest could not run {', '.join(mutation.tests)}:\n{output[-2000:]}")
    return code == FAILED


def main(words: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    if not chosen:
        print(f"no mutation is named like {' or '.join(words)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        code, output = run_tests(
            copy_project(Path(folder)), sorted({test for mutation in chosen for test in mutation.tests})
        )
    if code != PASSED:
        print(f"the tests fail without any mutation:\n{output[-2000:]}")
        return 1
    missed = 0
    for mutation in chosen:
        started = time.monotonic()
        try:
            verdict = "noticed" if notices(mutation) else "NOT NOTICED"
        except ValueError as error:
            verdict = f"ERROR: {error}"
        missed += verdict != "noticed"
        print(f"{mutation.name}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} passed, {missed} failed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
