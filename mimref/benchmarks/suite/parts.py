"""Parts of `mimref benchmark all` on a GPU, and their small versions on a CPU, which run the same code.

Every threshold is a number that the documentation promises, or comes from the tests or docs/results.md; a line without
such a number has no threshold. To add a part on another topic, such as decoding on the device or sharded training, add
a function call to `_cuda_parts` and `_cpu_parts`.
"""

from collections.abc import Sequence
from functools import partial

from mimref.benchmarks.suite import checkout, judging, reading, training
from mimref.benchmarks.suite.lines import Line, Part, Task, Threshold

TOTAL_S = {"cuda": 470.0, "cpu": 180.0}
"""Time limit in seconds for all parts; what has not started by then is not measured."""
GPU_ONLY = "needs CUDA"
"""Note for lines that a CPU cannot measure."""

EXACT = Threshold("at most", 1e-9, "float64, as CONTRIBUTING.md asks of changes that keep results")
SINGLE = Threshold("at most", 1e-4, "float32, as in tests/test_refinement_micro_batch.py")
PASSES = Threshold("at most", 0, "every test passes")
LARGE_BATCH = Threshold("at most", 24, "batch 1024 of a ViT-L on a card of 24 GB, which micro-batches promise")
NOT_SLOWER = "below 1, it costs time instead of saving it"
COMPILED = Threshold("at least", 1.0, f"the setting `compile` promises faster steps on CUDA; {NOT_SLOWER}")
SEARCH = Threshold("at least", 1.0, f"the search runs on the device by default; {NOT_SLOWER}")
SAME_KNN = Threshold("at most", 0.1, "rounding may change the order of near ties, in a query of a thousand at most")
HEADS = Threshold(
    "at least", 1.0, f"1.2 on one CPU thread at 4 images (docs/results.md, Speed of a step); {NOT_SLOWER}"
)
MANY_HEADS = Threshold(
    "at least", 0.9, "0.99 to 1.00 on one CPU thread at 64 images (docs/results.md), less a tenth for noise"
)
PROBES = Threshold("at least", 1.0, f"6.3 on two CPU cores (docs/results.md, Speed of the evaluations); {NOT_SLOWER}")
PROBES_CPU = Threshold("at least", 3.0, "half of the 6.3 of two CPU cores (docs/results.md, Speed of the evaluations)")
VIEWS = Threshold("at least", 4.0, "half of the 8.5 of one CPU thread (docs/results.md, Speed of the views)")
SAVED = Threshold("at most", 0.5, "0.36 in docs/results.md (Speed of a step), and what an allocator keeps")


def parts_for(device: str) -> list[Part]:
    """Return the parts to measure on a device, in order: the most important first, the longest last."""
    return _cuda_parts() if device == "cuda" else _cpu_parts()


def gpu_lines(device: str) -> list[tuple[str, Line]]:
    """Return part and line of everything that only a GPU can measure; nothing if `device` is CUDA."""
    if device == "cuda":
        return []
    own = {line.name for part in parts_for(device) for task in part.tasks for line in task.lines}
    return [
        (part.name, line)
        for part in _cuda_parts()
        for task in part.tasks
        for line in task.lines
        if line.name not in own
    ]


def _cuda_parts() -> list[Part]:
    return [
        Part("tests", (_tests("gpu", (), 90),)),
        Part(
            "gradients of micro-batches",
            (
                _gradient("quickstart", 32, 8, "fp64", EXACT),
                _gradient("mae_b16", 16, 4, "fp32", SINGLE),
                _gradient("mae_b16", 16, 4, "bf16", None),
            ),
        ),
        Part("memory", (_large_batch(),)),
        Part(
            "heads",
            tuple(_heads(images, 3, threshold) for images, threshold in ((16, HEADS), (64, MANY_HEADS), (1024, None))),
        ),
        Part("neighbours", _neighbours(50_000, 5_000, 768, on_gpu=True)),
        Part("probes", (_probes(1024, 1000, 10, PROBES),)),
        Part("views", (_views(16, 256, on_gpu=True),)),
        Part("extraction", (_extraction("mae_l16", 2048),)),
        Part("steps of ViT-B/16", _steps("ViT-B/16", "mae_b16", (32, 64, 128), 40)),
        Part("steps of ViT-L/16", _steps("ViT-L/16", "mae_l16", (16, 32, 64), 50)),
        Part("compilation", (_compiled("mae_b16", 64),)),
        Part("steps of ViT-H/14", _steps("ViT-H/14", "mae_h14", (8, 16, 32), 60)),
    ]


def _cpu_parts() -> list[Part]:
    return [
        Part("tests", (_tests("not gpu and not slow", ("tests/test_devices.py",), 60),)),
        Part(
            "gradients of micro-batches",
            (_gradient("quickstart", 32, 8, "fp64", EXACT), _gradient("quickstart", 32, 8, "fp32", SINGLE)),
        ),
        Part("memory", (_saved_memory(),)),
        Part("heads", tuple(_heads(images, 3, threshold) for images, threshold in ((4, HEADS), (64, MANY_HEADS)))),
        Part("neighbours", _neighbours(10_000, 1_000, 128, on_gpu=False)),
        Part("probes", (_probes(96, 10, 10, PROBES_CPU),)),
        Part("views", (_views(8, 8, on_gpu=False),)),
        Part("extraction", (_extraction("quickstart", 256),)),
        Part("steps of the quickstart's encoder", _steps("the quickstart's encoder", "quickstart", (8, 16, 32), 30)),
    ]


def _tests(mark: str, files: Sequence[str], limit_s: float) -> Task:
    marked = f"tests marked {mark}" if not files else f"tests of {', '.join(files)}"
    line = Line(f"{marked}, failed", "tests", PASSES)
    return Task((line,), partial(checkout.tests, line=line.name, mark=mark, files=tuple(files)), limit_s)


def _gradient(preset: str, batch: int, micro: int, precision: str, threshold: Threshold | None) -> Task:
    line = Line(f"difference of gradients, {precision}", "relative", threshold)
    measure = partial(
        training.gradients, line=line.name, preset=preset, batch=batch, micro=micro, precision=precision
    )  # fmt: skip
    return Task((line,), measure, 40)


def _large_batch() -> Task:
    line = Line("peak memory of ViT-L/16, batch 1024", "GB", LARGE_BATCH)
    return Task((line,), partial(training.peak_memory, line=line.name, preset="mae_l16", batch=1024, micro=16), 80)


def _saved_memory() -> Task:
    line = Line("memory of micro-batches, batch 128", "x one pass", SAVED)
    return Task((line,), partial(training.memory_ratio, line=line.name, preset="quickstart", batch=128, micro=32), 40)


def _heads(images: int, repeats: int, threshold: Threshold | None) -> Task:
    line = Line(f"twelve heads as one module, {images} images", "x as fast", threshold)
    return Task((line,), partial(training.heads, line=line.name, images=images, repeats=repeats), 30)


def _neighbours(train: int, test: int, width: int, *, on_gpu: bool) -> tuple[Task, ...]:
    exact = Line("k-NN against float64, difference", "points", SAME_KNN)
    faiss = Line("k-NN against faiss", "x as fast")
    faster = Line("k-NN on the GPU against the CPU", "x as fast", SEARCH)
    tasks = [
        Task((exact,), partial(judging.knn_exact, line=exact.name, train=10_000, test=1_000, width=128), 30),
        Task((faiss,), partial(judging.knn_faiss, line=faiss.name, train=train, test=test, width=width), 60),
    ]
    if on_gpu:
        tasks.insert(
            1, Task((faster,), partial(judging.knn_speedup, line=faster.name, train=train, test=test, width=width), 60)
        )
    return tuple(tasks)


def _probes(width: int, classes: int, steps: int, threshold: Threshold) -> Task:
    line = Line("52 probes as one module", "x as fast", threshold)
    measure = partial(judging.probes, line=line.name, width=width, classes=classes, steps=steps)
    return Task((line,), measure, 40)


def _views(images: int, device_images: int, *, on_gpu: bool) -> Task:
    worker = Line("views by a loader process, against torchvision with Pillow's blur", "x as fast", VIEWS)
    photometric = Line("views on the device, colours and blur", "images/s")
    measure = partial(
        reading.views,
        worker=worker.name,
        photometric=photometric.name,
        images=images,
        device_images=device_images,
    )  # fmt: skip
    return Task((worker, photometric) if on_gpu else (worker,), measure, 60)


def _extraction(preset: str, images: int) -> Task:
    files, memory = Line("extraction from JPEG files", "images/s"), Line("extraction from memory", "images/s")
    measure = partial(reading.extraction, files=files.name, memory=memory.name, preset=preset, images=images)
    return Task((files, memory), measure, 60)


def _steps(encoder: str, preset: str, batches: Sequence[int], limit_s: float) -> tuple[Task, ...]:
    """Return one task per batch; micro-batches are a quarter of the batch."""
    return tuple(
        Task(
            tuple(Line(name, "ms") for name in training.step_lines(encoder, batch)),
            partial(training.steps, encoder=encoder, preset=preset, batch=batch, micro=batch // 4),
            limit_s,
        )
        for batch in batches
    )


def _compiled(preset: str, batch: int) -> Task:
    line = Line("compiled step of ViT-B/16, 64 images", "x as fast", COMPILED)
    return Task((line,), partial(training.compiled, line=line.name, preset=preset, batch=batch), 100)
