"""Find the clips of a run, and settle where and with which settings their latents are written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samekit.dataset.captions import require_tag_reader
from samekit.dataset.file_names import require_distinct
from samekit.dataset.options import Settings
from samekit.dataset.output import find_output
from samekit.dataset.sources import find_sources
from samekit.errors import InputError
from samekit.files.paths import expanded_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from samekit.dataset.executor import ModelFacts
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.output import Output
    from samekit.dataset.sources import Found, Source
    from samekit.engine.spec import EngineSpec


@dataclass(frozen=True)
class Dataset:
    """The clips of a run, and where their latents go."""

    folders: list[str]
    found: Found
    sources: dict[str, Source]
    """Relpath -> source, of the clips of the shard."""
    output: Output
    settings: Settings
    spec: EngineSpec

    @classmethod
    def find(
        cls,
        facts: ModelFacts,
        data_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        output_path: str | os.PathLike[str],
        options: PreEncodeOptions,
    ) -> Self:
        """Search the data folders; raises InputError as `pre_encode`."""
        given = [data_dir] if isinstance(data_dir, (str, os.PathLike)) else list(data_dir)
        folders = [expanded_text(folder) for folder in given]
        if "tags" in options.captions:
            require_tag_reader()
        found = find_sources(folders, options.captions)
        shard, layout, spec = options.shard, options.layout, facts.spec
        if layout == "mirror":
            require_distinct(source.relpath for source in found.sources)
        sources = {source.relpath: source for source in found.sources if shard.contains(source.relpath, layout)}
        settings = Settings(
            model=spec.name,
            model_sha256=spec.source_sha256,
            precision=facts.precision,
            dtype=options.dtype,
            width=spec.latent_width,
            sample_rate=spec.sample_rate,
            cut=options.cut,
            layout=layout,
        )
        output = find_output(output_path)
        if any(map(output.is_at, folders)):
            raise InputError(f"{output}: is a --data_dir too; pass another --output_path")
        return cls(folders, found, sources, output, settings, spec)

    def require_visible(self, relpaths: Iterable[str]) -> None:
        """Raise InputError if clips of these relpaths can look gone because a folder is not mounted or not readable."""
        for folder in self.folders:
            if not any(Path(source.path).is_relative_to(folder) for source in self.found.sources):
                raise InputError(
                    f"{folder}: holds no audio, so its clips would count as gone; mount it, or leave it out of "
                    "--data_dir"
                )
        unreadable = tuple(f"{folder}{os.sep}" for folder in self.found.unreadable_folders)
        if hidden := next((relpath for relpath in relpaths if relpath.startswith(unreadable)), None):
            raise InputError(
                f"{hidden}: its folder cannot be read, so it would count as gone; check the permissions, or leave out "
                "--prune"
            )
