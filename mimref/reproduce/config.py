"""Settings of `mimref reproduce ablations`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mimref.refinement.config import RefineConfig

Table = Literal["a", "b", "c", "d", "e", "f"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class AblationsConfig(RefineConfig):
    """All settings of `mimref reproduce ablations`: those of the tables' default refinement, and the choice of runs."""

    command = "reproduce"
    presets_of = "refine"
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    """Random seeds: every refinement runs once with each."""
    tables: Annotated[list[Table], Field(min_length=1)] = ["a", "b", "c", "d", "e", "f"]
    """Parts of Table 1: number of heads, their spacing, loss schedule, frozen blocks, neighbour swap of negatives,
    augmentations."""
    jobs: int | None = Field(default=None, gt=0)
    """Concurrent runs. None: one on a GPU, else one per free core."""

    @model_validator(mode="after")
    def _check_ablations(self) -> Self:
        for name in ("seeds", "tables"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {','.join(map(str, values))}: name each once")
        if "seed" in self.model_fields_set:
            raise ValueError(f"seed {self.seed} is not used: every refinement runs with each of the seeds; set --seeds")
        if self.stage != "both":
            raise ValueError(f"stage = {self.stage!r}: the tables compare whole refinements; leave it out")
        if not self.evaluate.enabled or self.evaluate.shots != 1:
            raise ValueError("evaluate.enabled and evaluate.shots = 1 are needed: the tables show k-NN and 1-shot")
        if self.loss.schedule != "constant" or self.loss.swap_negatives or self.encoder_stage.freeze_blocks:
            varied = "loss.schedule, loss.swap_negatives and encoder_stage.freeze_blocks"
            raise ValueError(f"{varied} are varied by the tables; leave them at constant, false and 0")
        if isinstance(self.heads.temperature, list):
            raise ValueError("heads.temperature is a list, but the tables change the number of heads; set one value")
        return self


def refine_settings(config: RefineConfig) -> RefineConfig:
    """Return the settings of `mimref refine` among those of a suite."""
    return RefineConfig.model_validate({name: getattr(config, name) for name in RefineConfig.model_fields})
