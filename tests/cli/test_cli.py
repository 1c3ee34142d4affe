"""The command line: what it passes on, what it prints, and its exit codes. The work itself is replaced by fakes."""

import errno
import json
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mimref
from mimref.cli import app, benchmark, evaluation, run, training, weights
from mimref.config.load import setting_fields
from mimref.errors import DataError, Interrupted
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.config import CompareConfig, InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.probe.config import ProbeConfig
from mimref.features.config import ExtractConfig
from mimref.pretraining.config import PretrainConfig
from mimref.refinement.config import RefineConfig
from mimref.results import Row, write_results

ROWS: list[Row] = [
    {"model": model, "metric": "knn_top1", "value": value, "k": 10, "tau": 0.07}
    for model, value in (("raw pixels", 90.0), ("base", 91.0), ("refined", 93.5))
]


@dataclass
class Calls:
    """The arguments of the last call of the fake work; `then` runs inside it."""

    config: Any = None
    out: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    then: Callable[[Any], None] = lambda listener: None
    count: int = 0

    def __call__(self, config: Any, out: Path | None = None, **options: Any) -> types.SimpleNamespace:
        listener, checks = options.pop("listener"), options.pop("checks")
        checks.finish()
        self.config, self.out, self.count = config, out, self.count + 1
        self.options = options
        self.then(listener)
        if out is not None:  # training commands write their folder themselves
            write_results(out, config.command, config.model_dump(mode="json"), 1.5, ROWS)
        return types.SimpleNamespace(rows=ROWS, elapsed_s=1.5, out=out, bad_images=[], data=None)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Fakes in place of everything that would import torch; the current folder is empty."""
    calls = Calls()
    for module, name in (
        ("mimref.refinement.run", "refine"),
        ("mimref.pretraining.run", "pretrain"),
        ("mimref.evaluation.knn.protocol", "evaluate_knn"),
    ):
        fake = types.ModuleType(module)
        setattr(fake, name, calls)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.chdir(tmp_path)
    return calls


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


def test_refine_passes_its_options_on(work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    line = "refine --arch vit_h14 --source d2v2 --weights w.pth --data imgs --epochs 7 --heads-epochs 2 --batch-size 64"
    line += " --heads 20,22 --device cpu --precision fp32 --seed 3 --workers 0 --set heads.temperature=0.1 --set seed=4"
    assert run([*line.split(), "--out", "here", "--force"]) == 0
    config = work.config
    assert config.preset == "refine/d2v2_h14"
    assert (config.encoder.arch, config.encoder.source, config.encoder.weights) == ("vit_h14", "d2v2", "w.pth")
    assert (config.encoder_stage.epochs, config.heads_stage.epochs, config.batch_size) == (7, 2, 64)
    assert (config.heads.blocks, config.heads.temperature, config.data.spec) == ("20,22", 0.1, "imgs")
    assert (config.device, config.precision, config.seed, config.workers) == ("cpu", "fp32", 4, 0)
    assert (work.out, work.options) == (Path("here"), {"resume": False, "force": True})
    results = json.loads(Path("here/results.json").read_text())
    assert (results["command"], results["metrics"], results["elapsed_s"]) == ("refine", ROWS, 1.5)
    assert results["config"]["heads"]["blocks"] == "20,22"
    assert "+2.5" in capsys.readouterr().out


def test_a_gpu_without_memory_is_one_line(work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.00 "
            "GiB is free. See documentation for Memory Management\n  (https://pytorch.org/docs/stable/notes/cuda.html)"
        )

    work.then = fail
    assert run(["knn", "--quiet"]) == 2
    advice = "lower batch_size, or the micro_batch of a training run"
    assert one_line(capsys) == f"mimref: error: CUDA out of memory. Tried to allocate 20.00 GiB; {advice}"


def test_other_errors_keep_their_traceback(work: Calls) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("odd")

    work.then = fail
    with pytest.raises(RuntimeError, match=r"^odd$"):
        run(["knn", "--quiet"])


def test_heads_from_runs_stage_2_alone(work: Calls) -> None:
    assert run(["refine", "--preset", "mae_l16", "--heads-from", "runs/a"]) == 0
    assert (work.config.stage, work.config.heads_from) == ("encoder", "runs/a")
    assert work.out == Path("runs/refine-mae_l16")


def test_settings_that_choose_a_preset_may_be_set(work: Calls) -> None:
    for line, preset, file in (
        ("refine --set encoder.weights=w.pth", None, "w.pth"),
        ("refine --set encoder.weights='quickstart'", "refine/quickstart", "quickstart"),
        ("refine --set encoder.arch=vit_l16 --set encoder.source=mae", "refine/mae_l16", None),
        ("refine --weights w.pth --set data.spec=digits", None, "w.pth"),
        ("refine", "refine/quickstart", "quickstart"),
    ):
        assert run(line.split()) == 0
        assert (work.config.preset, work.config.encoder.weights) == (preset, file), line
    for line, preset in (
        ("pretrain --arch vit_b16 --set objective=simmim", None),
        ("pretrain --set encoder.arch=vit_b16", "pretrain/mae_b16"),
        ("pretrain --set data.spec=images", None),
    ):
        assert run(line.split()) == 0
        assert work.config.preset == preset, line


def test_a_dry_run_finds_missing_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["refine", "--preset", "quickstart", "--heads-from", str(tmp_path / "gone"), "--dry-run"]) == 2
    assert "gone" in capsys.readouterr().err


def test_output_folders_are_named_after_the_preset(work: Calls) -> None:
    Path("mine.toml").write_text('base = "mae_b16"\n')
    for preset, out in (("ablation/a_heads1", "refine-ablation-a_heads1"), ("mine.toml", "refine-mine")):
        assert run(["refine", "--preset", preset]) == 0
        assert work.out == Path("runs") / out


def test_pretrain_passes_its_options_on(work: Calls) -> None:
    assert run(["pretrain", "--arch", "vit_b16", "--data", "imgs", "--epochs", "50", "--batch-size", "32"]) == 0
    assert (work.config.preset, work.config.mae.epochs, work.config.batch_size) == ("pretrain/mae_b16", 50, 32)
    assert work.out == Path("runs/pretrain-mae_b16")


def test_epochs_of_pretrain_are_those_of_the_objective(work: Calls) -> None:
    assert run(["pretrain", "--objective", "simmim", "--epochs", "7"]) == 0
    assert (work.config.preset, work.config.objective, work.config.simmim.epochs) == (None, "simmim", 7)
    assert run(["pretrain", "--data", "imgs", "--epochs", "7", "--set", "objective=simmim"]) == 0
    assert (work.config.simmim.epochs, work.config.mae.epochs) == (7, 800)
    assert run(["pretrain", "--preset", "peak", "--epochs", "7"]) == 0
    assert (work.config.preset, work.config.simmim.epochs) == ("pretrain/peak", 7)
    assert run(["pretrain", "--preset", "mae_b16", "--objective", "simmim"]) == 0
    assert work.config.simmim.epochs == 800


def test_knn_without_arguments_takes_the_digits(work: Calls) -> None:
    assert run(["knn"]) == 0
    # No data: the packaged encoder's header names its images.
    assert (work.config.checkpoint, work.config.data.spec, work.config.k) == ("quickstart", None, [10])


def test_knn_passes_its_options_on(work: Calls) -> None:
    line = "knn w.pth --k 5,10 --tau 0.1 --blocks last4 --pool cls+mean --final-norm --resolution 98 --out res"
    assert run(line.split()) == 0
    config = work.config
    assert (config.checkpoint, config.data.spec, config.k, config.tau) == ("w.pth", None, [5, 10], [0.1])
    assert (config.blocks, config.pool, config.final_norm, config.resolution) == ("last4", "cls+mean", True, 98)
    assert Path("res/results.csv").is_file()
    assert run(line.split()) == 2
    assert run([*line.split(), "--force"]) == 0


def test_resume_takes_the_settings_of_the_run(work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("mine")
    out.mkdir()
    (out / "config.toml").write_text('preset = "refine/x"\nseed = 7\n[encoder]\nweights = "w.pth"\n')
    assert run(["refine", "--resume", "--out", "mine"]) == 0
    assert (work.config.seed, work.config.encoder.weights, work.config.preset) == (7, "w.pth", "refine/x")
    assert work.options == {"resume": True, "force": False}
    first = capsys.readouterr().out
    # The run is finished now: nothing runs, and the results are printed again.
    assert run(["refine", "--resume", "--out", "mine"]) == 0
    assert work.count == 1
    assert capsys.readouterr().out == first
    (out / "results.json").write_text("{")
    assert run(["refine", "--resume", "--out", "mine"]) == 2
    assert "results.json cannot be read" in one_line(capsys)
    # A preset given with --resume is passed on: the run itself compares its settings with those it was started with.
    (out / "results.json").unlink()
    assert run(["refine", "--preset", "mae_l16", "--resume", "--out", "mine"]) == 0
    assert work.config.preset == "refine/mae_l16"


MISTAKES = {
    "refine --preset mae_l61": ("'mae_l61'", "'mae_l16'"),
    "refine --preset nowhere.toml": ("'nowhere.toml'",),
    "refine --preset mae_l16 --set heads.temprature=1": ("'heads.temprature'", "'heads.temperature'"),
    "refine --preset mae_l16 --batch-size 1": ("--batch-size 1:",),
    "refine --preset mae_l16 --epochs many": ("--epochs many:", "whole number"),
    "refine --preset mae_l16 --seed=-1": ("--seed -1:", "at least 0"),
    "refine --preset mae_l16 --stage head": ("--stage head:", "'heads'"),
    "refine --preset mae_l16 --heads first3": ("--heads first3:", "last8"),
    "refine --source mae": ("--source", "--preset", "--arch", "--weights"),
    "knn --k ten": ("--k ten: expected whole numbers separated by commas, such as 10,20",),
    "knn --set k=ten": ('k = ["ten"]:',),
    "knn --k 5 --set k=ten": ('k = ["ten"]:',),
    "knn --k 0": ("--k 0:", "greater than 0"),
    "refine --weights x.pth --set preset=quickstart": ("--set preset=quickstart", "--preset quickstart"),
    "reproduce ablations --seeds 0 1 2": ("1 2",),
    "interpolate a b --alpha 0 1": ("(1)",),
    "knn --tau 1,x": ("--tau 1,x:", "numbers separated by commas"),
    "presets show nothing": ("'nothing'", "`mimref presets list`"),
    # Mistakes that the parser itself finds.
    "refine --bacth-size 3": ("--bacth-size", "--batch-size"),
    "refine --epochs": ("--epochs",),
    "refine extra": ("extra", "--weights"),
    "refine --weights=x.pth --out=": ("--out: the value is empty",),
    "refine --weights '' --out x": ("--weights: the value is empty",),
    "knn x.pth ''": ("an argument: the value is empty",),
    "knn -- ''": ("the value is empty",),
    "refin": ("'refin'", "'refine'"),
    "presets show": ("NAME",),
    "compare base.pth": ("REFINED",),
    "--wrong": ("--wrong",),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(line: str, work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(line)) == 2
    message = one_line(capsys)
    assert message.startswith("mimref: error: ") and all(part in message for part in MISTAKES[line]), message
    assert not list(Path().iterdir())


def raising(error: BaseException) -> Callable[[Any], None]:
    def raise_it(listener: Any) -> None:
        raise error

    return raise_it


def test_exit_codes(work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["refine", "--preset", "mae_l16"]
    for error, code, message in (
        (DataError("no such folder 'x'\nat all"), 2, "mimref: error: no such folder 'x' at all"),
        (Interrupted(signal.SIGTERM, "saved step 3"), 143, "mimref: saved step 3"),
        (Interrupted(signal.SIGINT, "saved step 3"), 130, "mimref: saved step 3"),
        (OSError(errno.ENOSPC, "No space", "f.bin"), 2, "mimref: error: disk full while writing f.bin; "),
    ):
        work.then = raising(error)
        assert run(line) == code
        assert one_line(capsys).startswith(message)
    work.then = raising(KeyboardInterrupt())
    assert run(line) == 130


def test_bugs_keep_their_traceback(work: Calls) -> None:
    work.then = raising(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run(["refine", "--preset", "mae_l16"])


def test_debug_shows_the_traceback(work: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    work.then = raising(DataError("no such folder"))
    assert run(["refine", "--preset", "mae_l16", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("mimref: error: no such folder\n")


def test_progress_and_notes_go_to_stderr_and_quiet_keeps_warnings(
    work: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(listener: Any) -> None:
        listener.note("a note before")
        listener.progress("stage 1", 2, 2)
        listener.note("a note between")
        listener.progress("stage 2", 1, 1)
        listener.warn("careful")

    work.then = speak
    assert run(["refine", "--preset", "mae_l16"]) == 0
    loud = capsys.readouterr()
    lines = [line for line in loud.err.splitlines() if not line.startswith(("encoder in", "report in"))]
    assert [line.split(":")[0] for line in lines] == [
        "a note before",
        "stage 1",
        "a note between",
        "stage 2",
        "warning",
    ]
    assert run(["refine", "--preset", "mae_l16", "--quiet", "--out", "b"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "warning: careful\n"
    assert quiet.out == loud.out


def test_presets_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("refine/ablation/a_heads1 ") and "Table 1a" in line for line in listed)
    assert run(["presets", "show", "d2v2_l16"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# data2vec 2.0 ViT-L/16")
    assert shown.endswith("epochs = 20\n")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"{mimref.__version__}\n"
    for args in ([], ["--help"]):
        assert run(args) == 0
        printed = capsys.readouterr().out
        panels = ["Options:", "Refine:", "Evaluate:", "Transfer:", "Weights:", "Tools:", "Examples:"]
        assert [line for line in printed.splitlines() if line.endswith(":")] == panels
        assert "--install-completion" in printed


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command below a group, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_help_has_panels_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    found = dict(commands(get_command(app)))
    assert len(found) >= 24
    for words, command in found.items():
        assert run([*words, "--help"]) == 0
        printed = capsys.readouterr().out
        # Options without a panel would be listed under Options. Every command can show a traceback.
        assert "\nRun:\n" in printed and "\nOptions:\n" not in printed and "--debug" in printed
        assert f"\nExamples:\n  mimref {' '.join(words)}" in printed and "\x1b" not in printed
        assert [param.opts for param in command.params if not param.help] == []


def test_help_on_a_terminal_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["cluster", "--help"]) == 0
    printed = re.sub(r"\x1b\[[\d;]*m", "", coloured := capsys.readouterr().out)
    assert printed != coloured and " Protocol " in printed and "mimref cluster runs/mae_l16 --classes" in printed


@pytest.mark.parametrize(
    ("words", "completed"),
    [("mimref kn", {"knn"}), ("mimref knn --pool ", {"cls", "mean", "cls+mean"}), ("mimref cache v", {"verify"})],
)
def test_completion(
    words: str, completed: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MIMREF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit, match="0"):
        run([])
    assert set(capsys.readouterr().out.split()) == completed


def test_options_and_settings_agree() -> None:
    """Every option that overrides a setting names a setting of its command's config."""
    configs = {
        evaluation.KnnOptions: KnnConfig,
        evaluation.LowshotOptions: LowshotConfig,
        evaluation.ClusterOptions: ClusterConfig,
        evaluation.ProbeOptions: ProbeConfig,
        evaluation.BlocksOptions: BlocksConfig,
        evaluation.AssessOptions: AssessConfig,
        evaluation.CompareOptions: CompareConfig,
        evaluation.ExtractOptions: ExtractConfig,
        weights.InterpolateOptions: InterpolateConfig,
        training.RefineOptions: RefineConfig,
        training.PretrainOptions: PretrainConfig,
        benchmark.CostOptions: RefineConfig,
    }
    for options, config in configs.items():
        for name, (option, _) in options.declared().items():
            assert option.sets is None or option.sets in setting_fields(config), (options, name)


def test_the_api_is_lazy_and_complete() -> None:
    code = (
        "import sys, mimref; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules; mimref.RefineConfig()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"refine", "pretrain", "knn", "load_config", "__version__"} <= set(dir(mimref))
    with pytest.raises(AttributeError, match="no attribute 'refin'"):
        _ = mimref.refin


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from mimref.cli import run; run(['refine', '--help']); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    # Not pydantic: Typer itself imports the light half of it.
    loaded = set(printed.splitlines()[-1].split())
    assert not loaded & {"torch", "timm", "numpy", "sklearn", "rich", "matplotlib", "pandas", "mimref.config.base"}


def test_a_value_outside_the_choices_is_named_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "quickstart", "--to", "foo", "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert "--to" in told and "'foo'" in told and "'onnx'" in told and "Value error" not in told
