"""The text that the demo's tokenizer is trained on and its prompts are cut from: the project's own."""

from __future__ import annotations

from pathlib import Path

import s2_kernels
import s2_vllm


def project_text() -> str:
    """README.md, where the package lies in a checkout, and the Python sources of both packages."""
    packages = [Path(str(package.__file__)).parent for package in (s2_vllm, s2_kernels)]
    readme = packages[0].parent / "README.md"
    sources = [source for package in packages for source in sorted(package.rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in (readme, *sources) if path.is_file())
