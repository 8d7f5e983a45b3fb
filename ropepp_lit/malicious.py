"""Check for malicious releases of dependencies, which execute an attacker's code when they are imported."""

from __future__ import annotations

from importlib import metadata

from ropepp_lit.errors import UsageError

MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Malicious versions by package. These two steal credentials (GHSA-w37p-236h-pfx3). pyproject.toml excludes them, but
they may have been installed by other means."""


def refuse_malicious() -> None:
    """Check the installed versions without importing them; called before Lightning is imported.

    Raises:
        UsageError: a malicious version is installed.
    """
    for name, versions in MALICIOUS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version in versions:
            fixed = " ".join(f"'{package}>=2.6.4,<2.7'" for package in MALICIOUS)
            raise UsageError(
                f"{name} {version} is malicious (GHSA-w37p-236h-pfx3) and was not imported: run pip install {fixed}, "
                "and replace every password, key and token on this machine if anything else has imported it"
            )
