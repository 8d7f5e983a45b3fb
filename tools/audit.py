#!/usr/bin/env python3
"""Check the packages that CI installs for known vulnerabilities with pip-audit.

    python tools/audit.py [--sbom FILE]

Exits with 1 if a package is vulnerable. If nothing could be checked (no connection, or a mirror of PyPI that does not
serve vulnerabilities), it prints the reason and exits with 0.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / ".github" / "requirements.txt"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-r", str(REQUIREMENTS)]
    options = ("--progress-spinner", "off", *options)
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sbom", type=Path, help="write the list of packages as CycloneDX JSON")
    arguments = parser.parse_args()
    found = run("--format", "json")
    if not found.stdout.strip():
        lines = found.stderr.strip().splitlines() or ["no answer"]
        if "ConnectionError" not in found.stderr and "ServiceError" not in found.stderr:
            print(found.stderr, file=sys.stderr)
            return 1
        print(f"audit skipped: {lines[-1]}")
        return 0
    packages = json.loads(found.stdout)["dependencies"]
    unknown = [package for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        print(f"audit skipped: the registry has no data on all {len(unknown)} packages: {unknown[0]['skip_reason']}")
        return 0
    if unknown:
        print("not checked:", ", ".join(sorted(package["name"] for package in unknown)))
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for vulnerability in package["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    print(f"{len(packages) - len(unknown)} packages checked, {len(vulnerable)} vulnerable")
    if arguments.sbom is not None:
        arguments.sbom.write_text(run("--format", "cyclonedx-json").stdout)
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
