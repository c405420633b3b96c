"""Hook of mkdocs: takes pages from the whole repository and keeps their paths.

A relative link is then written once. It works on a code host, in an editor and on the site.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.css",
    "docs/img/*",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by those that PAGES names, and keep the theme's."""
    root = Path(config.config_file_path).parent
    paths = sorted({path for pattern in PAGES for path in root.glob(pattern) if path.is_file()})
    ours = [
        File(path.relative_to(root).as_posix(), str(root), config.site_dir, config.use_directory_urls)
        for path in paths
    ]
    return Files([*ours, *(file for file in files if file.src_dir != config.docs_dir)])
