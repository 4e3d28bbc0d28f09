"""Buckets for the tests of this folder: one server of gs:// and one of s3:// a process, which the tests start."""

import os

import fsspec
import pytest

from elbo_kto_jax.runtime import buckets, files
from tests.buckets.gcs_server import Bucket, GcsServer

NAME = "test-bucket"


def _forget_servers() -> None:
    buckets.filesystem.cache_clear()
    files._try_writing.cache_clear()
    fsspec.config.conf.clear()
    for name in ("gs", "s3"):
        fsspec.get_filesystem_class(name).clear_instance_cache()


@pytest.fixture(scope="session")
def server():
    """The server of gs://, to which the environment of this process points; commands that it starts inherit it.

    TensorStore reads its address once.
    """
    patch = pytest.MonkeyPatch()
    with GcsServer() as started, patch.context() as changed:
        for name, value in started.environment.items():
            changed.setenv(name, value)
        for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
            changed.delenv(name, raising=False)
        _forget_servers()
        yield started
    for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        os.environ.pop(name, None)
    _forget_servers()


@pytest.fixture
def bucket(server):
    """The name of an empty bucket."""
    server.buckets[NAME] = Bucket()
    files._try_writing.cache_clear()
    return NAME


@pytest.fixture(scope="session")
def s3():
    """The URL of an empty bucket of s3://, in moto's server."""
    server_of_moto = pytest.importorskip("moto.server")
    started = server_of_moto.ThreadedMotoServer(port=0)
    started.start()
    host, port = started.get_host_and_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch().context() as changed:
        for name, value in {**values, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            changed.setenv(name, value)
        _forget_servers()
        buckets.filesystem("s3").mkdir(NAME)
        yield f"s3://{NAME}"
    started.stop()
    _forget_servers()
