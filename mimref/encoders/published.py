"""Published weights by name: address, licence and cached copy.

Addresses and licences come from the authors' own pages. Only MAE's authors publish (part of) a hash; for all other
files, the size that the server announces is checked, and the tensors themselves are recognised.
"""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from mimref.errors import CheckpointError, OutputError
from mimref.files import atomic_path, cache_folder, remove_halves
from mimref.locks import one_at_a_time
from mimref.progress import LabelledProgress

_TIMEOUT_S = 30
_PIECE_BYTES = 1 << 20

_META = "https://dl.fbaipublicfiles.com"
_BYTEDANCE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource"
_JKU = "https://ml.jku.at/research/mimrefiner/download"
_CROSSMAE = "https://huggingface.co/longlian/CrossMAE/resolve/main"
_MUGS = "https://huggingface.co/zhoupans/Mugs/resolve/main/pretrained%20models"

# From a method to the licence of its weights, if the authors state one.
_LICENCES = {
    **dict.fromkeys(("mae", "maws", "d2v2", "crossmae", "ijepa"), "CC-BY-NC-4.0"),
    **dict.fromkeys(("dbot", "ibot", "dino", "dinov2", "mugs"), "Apache-2.0"),
}

PACKAGED = ("quickstart", "peak")
"""Encoders inside the package: a masked autoencoder of digits, and one whose middle blocks are best."""
# The paper's released models end in `_refined_SIZE`; all others are named `SOURCE_SIZE`, as in --source and --arch.
ADDRESSES = {
    "mae_b16": f"{_META}/mae/pretrain/mae_pretrain_vit_base.pth",
    "mae_l16": f"{_META}/mae/pretrain/mae_pretrain_vit_large.pth",
    "mae_h14": f"{_META}/mae/pretrain/mae_pretrain_vit_huge.pth",
    "mae_2b14": f"{_META}/maws/pretrain/mae_in1k/vit_2b14.pt",
    **{f"maws_{size}": f"{_META}/maws/pretrain/maws/vit_{size}.pt" for size in ("b16", "l16", "h14", "2b14")},
    "d2v2_b16": f"{_META}/fairseq/data2vec2/base_imagenet.pt",
    "d2v2_l16": f"{_META}/fairseq/data2vec2/large_imagenet.pt",
    "d2v2_h14": f"{_META}/fairseq/data2vec2/huge_imagenet.pt",
    "dbot_b16": f"{_BYTEDANCE}/mmodal/dbot/84.5_dbot_base_pre.pth",
    "dbot_l16": f"{_BYTEDANCE}/mmodal/dbot/86.6_dbot_large_pre.pth",
    "dbot_h14": f"{_BYTEDANCE}/mmodal/dbot/87.4_dbot_huge_pre.pth",
    **{
        f"crossmae_{size}16": f"{_CROSSMAE}/vit{size}-mr0.75-kmr0.75-dd12/"
        f"imagenet-mae-cross-vit{size}-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth"
        for size in ("b", "l")
    },
    "ijepa_h14": f"{_META}/ijepa/IN1K-vit.h.14-300e.pth.tar",
    "ibot_b16": f"{_BYTEDANCE}/archive/2022/ibot/vitb_16/checkpoint_teacher.pth",
    "ibot_l16": f"{_BYTEDANCE}/archive/2022/ibot/vitl_16/checkpoint_teacher.pth",
    "dino_b16": f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    **{f"dinov2_{size}14": f"{_META}/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth" for size in "sblg"},
    "mugs_b16": f"{_MUGS}/vit_base_400ep/vit_base_backbone_400ep.pth",
    "mugs_l16": f"{_MUGS}/vit_large_250ep/vit_large_backbone_250ep.pth",
    "msn_b16": f"{_META}/msn/vitb16_600ep.pth.tar",
    "msn_l16": f"{_META}/msn/vitl16_600ep.pth.tar",
    "mae_refined_l16": f"{_JKU}/maerefined_l16.th",
    "mae_refined_h14": f"{_JKU}/maerefined_h14.th",
    "mae_refined_2b14": f"{_JKU}/maerefined_twob14.th",
    "d2v2_refined_l16": f"{_JKU}/d2v2refined_l16.th",
    "d2v2_refined_h14": f"{_JKU}/d2v2refined_h14.th",
    "dbot_refined_l16": f"{_JKU}/dbotrefined_l16.th",
    "dbot_refined_h14": f"{_JKU}/dbotrefined_h14.th",
    "crossmae_refined_l16": f"{_JKU}/crossmaerefined_l16.th",
}
# First digits of the files' MD5 sums, from MAE's README.
_MD5 = {"mae_b16": "8cad7c", "mae_l16": "b8b06e", "mae_h14": "9bdbb0"}


@dataclass(frozen=True)
class PublishedWeights:
    """A file of published weights."""

    name: str
    url: str
    source: str
    """Pre-training method, as `--source` names it."""

    @property
    def arch(self) -> str:
        """Architecture, as `--arch` names it."""
        return f"vit_{self.name.rpartition('_')[2]}"

    @property
    def file(self) -> Path:
        """Path of the cached copy."""
        return cache_folder() / "weights" / f"{self.name}{Path(self.url).suffix}"

    @property
    def licence(self) -> str | None:
        """Licence of the weights; None if the authors state none."""
        return None if "_refined_" in self.name else _LICENCES.get(self.source)


def find_published(name: str) -> PublishedWeights | None:
    """Return the published weights of this name; None if there are none."""
    return PublishedWeights(name, ADDRESSES[name], name.split("_")[0]) if name in ADDRESSES else None


def find_named(path: str | Path) -> PublishedWeights | None:
    """Return the published weights that a path names; None if there are none, or if the path exists."""
    return None if Path(path).exists() else find_published(str(path))


def must_download(name: str) -> bool:
    """Return whether weights come from a server: published ones that are not cached, or timm's."""
    known = find_named(name)
    return name.startswith("timm:") or (known is not None and not known.file.is_file())


def official_name(arch: str, source: str) -> str:
    """Name the published weights of an `--arch` and a `--source`. Raises CheckpointError if there are none."""
    size = arch.removeprefix("vit_")
    if f"{source}_{size}" in ADDRESSES:
        return f"{source}_{size}"
    pairs = [name.split("_") for name in ADDRESSES if "_refined_" not in name]
    sources = ", ".join(known for known, known_size in pairs if known_size == size)
    archs = ", ".join(f"vit_{known_size}" for known, known_size in pairs if known == source)
    published = [f"{arch} is available from {sources}"] * bool(sources)
    published += [f"{source} is available as {archs}"] * bool(archs)
    raise CheckpointError(
        f"no published weights of {arch} from {source}: {'; '.join(published) or 'neither is known here'}; "
        "pass --weights FILE instead"
    )


def fetch(known: PublishedWeights, progress: LabelledProgress | None = None) -> Path:
    """Return the cached copy of published weights, downloaded if there is none; progress is in megabytes.

    Raises CheckpointError, with the address and the path at which to save the file, if the download fails or is not
    what was published.
    """
    file = known.file
    if file.is_file():
        return file
    label = f"waiting for another process to download {known.name}"
    with one_at_a_time(file, lambda: progress(label, 0, 1) if progress else None):
        if file.is_file():
            return file
        try:
            remove_halves(file.parent, file.name)
            with atomic_path(file) as temporary:
                _download(known, temporary, progress)
        # http.client's errors are not OSErrors, which atomic_path turns into OutputErrors.
        except (HTTPException, OutputError) as error:
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise CheckpointError(f"{known.name}: cannot be fetched ({reason}); save {known.url} as {file}") from error
    return file


def _download(known: PublishedWeights, path: Path, progress: LabelledProgress | None) -> None:
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with urlopen(known.url, timeout=_TIMEOUT_S) as response, path.open("wb") as stream:
        total = int(response.headers.get("Content-Length") or 0)
        while piece := response.read(_PIECE_BYTES):
            stream.write(piece)
            digest.update(piece)
            done += len(piece)
            if progress and total:
                progress(f"download of {known.name} in MB", done // 10**6, total // 10**6)
    if total and done != total:
        raise OSError(f"only {done} of {total} bytes arrived")
    expected = _MD5.get(known.name, "")
    if not digest.hexdigest().startswith(expected):
        raise OSError(f"its MD5 sum {digest.hexdigest()} does not begin with the published {expected}")
