"""Malicious releases of dependencies are refused before they are imported."""

import os
import subprocess
import sys

import pytest

FOUND = (
    "{} is malicious (GHSA-w37p-236h-pfx3) and was not imported: run pip install 'lightning>=2.6.4,<2.7' "
    "'pytorch-lightning>=2.6.4,<2.7', and replace every password, key and token on this machine if anything else has "
    "imported it\n"
)


@pytest.mark.end_to_end
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_malicious_releases_are_not_imported(tmp_path, command_path, name, version):
    module = name.replace("-", "_")
    package, info = tmp_path / "site" / module, tmp_path / "site" / f"{module}-{version}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    expected = FOUND.format(f"{name} {version}")

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    command = {"2.6.2": ["fit", "--help"], "2.6.3": ["prepare", "site", "--out", "out"]}[version]
    refused = run(command_path, *command)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"ropepp-lit: error: {expected}")
    if version == "2.6.3":
        imported = run(sys.executable, "-c", "import ropepp_lit.data.token_data")
        assert imported.returncode == 1
        assert imported.stderr.endswith(f"UsageError: {expected}")
    assert run(command_path, "--help").returncode == 0
    assert not (tmp_path / "ran").exists()
