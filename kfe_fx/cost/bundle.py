"""A bundle of probes for a device without PyTorch and without kfe-fx: models, a manifest, and the script to run."""

from __future__ import annotations

import json
from pathlib import Path

from kfe_fx.cost import probes
from kfe_fx.cost.calibrate import built_in_constants, factors
from kfe_fx.cost.probe_models import probe_models, stair_models
from kfe_fx.errors import BadFile
from kfe_fx.format.atomic import replacing

SCRIPT = "run_probes.py"


def write_bundle(folder: Path, *, force: bool = False) -> list[Path]:
    """Write the probes as ONNX files and ``run_probes.py``, which needs onnxruntime and numpy only.

    On the device, `python run_probes.py -o device.json` writes what ``read_device`` reads; `--precision int8` measures
    for int8 networks. The manifest comes last.

    Raises:
        BadFile: ``folder`` is no folder, has something in it (without ``force``), or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise BadFile(f"{folder}: a file is in the way; name a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise BadFile(f"{folder}: not empty; replace the bundle with --force or name another folder")
    files: dict[str, bytes] = {}
    models: dict[str, dict[str, dict[str, str]]] = {}
    for precision in probes.PRECISIONS:
        start = "" if precision == "fp32" else f"{precision}-"
        made = {"probes": ("probe", probe_models(precision)), "stairs": ("stair", stair_models(precision))}
        models[precision] = {}
        for kind, (word, payloads) in made.items():
            models[precision][kind] = {str(name): f"{start}{word}-{name}.onnx" for name in payloads}
            files |= {f"{start}{word}-{name}.onnx": payload for name, payload in payloads.items()}
    files[SCRIPT] = Path(probes.__file__).read_bytes()
    manifest = {"models": models, "built_in": built_in_constants(), "factors": factors()}
    files[probes.MANIFEST] = json.dumps(manifest, indent=1).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"{folder}: cannot be made ({error.strerror or error}); name another folder") from error
    for name, payload in files.items():
        with replacing(folder / name) as handle:
            handle.write(payload)
    return [folder / name for name in files]
