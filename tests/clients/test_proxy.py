"""docs/serving/: nginx as a reverse proxy with TLS, and the systemd unit."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE, PROGRAMS, ROOT, until

CONFIGURATION = ROOT / "docs/serving/nginx.conf"
UNIT = ROOT / "docs/serving/eqim-serve.service"
MIB = 1 << 20
# The name of the server in the configuration.
NAME = "images.example.com"
IMAGE = {"prompt": "forest", "seed": 3, "num_inference_steps": 2}
# Runs a program after prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN).
NO_NEW_CODE = [
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])",
]
# The program around the server blocks. It is one process, of the user of the test.
MAIN = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/eqim.conf;
}}
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with a certificate that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    kind = [
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=eqim",
    ]
    command = [
        "openssl",
        "req",
        *kind,
        "-addext",
        f"subjectAltName=DNS:{NAME}",
        "-keyout",
        "key.pem",
        "-out",
        "certificate.pem",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


class Proxy:
    """A running nginx with the configuration of the documentation: only paths, ports and the upstream are replaced."""

    def __init__(self, folder, certificate, upstream):
        self.port, self.plain_port = free_port(), free_port()
        self.certificate = certificate / "certificate.pem"
        text = CONFIGURATION.read_text()
        for old, new in [
            ("\n    listen 443 ssl;", f"\n    listen 127.0.0.1:{self.port} ssl;"),
            ("\n    listen 80;", f"\n    listen 127.0.0.1:{self.plain_port};"),
            ("\n    server 127.0.0.1:8000;", f"\n    server {upstream};"),
            ("ssl_certificate /etc/ssl/eqim/certificate.pem;", f"ssl_certificate {self.certificate};"),
            ("ssl_certificate_key /etc/ssl/eqim/key.pem;", f"ssl_certificate_key {certificate / 'key.pem'};"),
        ]:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "eqim.conf").write_text(text)
        (folder / "main.conf").write_text(MAIN.format(folder=folder))
        self.folder, self.log = folder, folder / "error.log"
        program = next(path for path in ["/usr/sbin/nginx", "/usr/bin/nginx"] if os.path.exists(path))
        command = [program, "-p", folder, "-e", self.log, "-c", folder / "main.conf"]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert checked.returncode == 0 and "warn" not in checked.stderr, checked.stderr
        self.process = subprocess.Popen(command)
        until(lambda: is_open(self.port) or self.process.poll() is not None, "start of nginx")

    def command(self, path, *options):
        """A command of curl for a path of the proxy."""
        resolve = ["--resolve", f"{NAME}:{self.port}:127.0.0.1", "--cacert", self.certificate, "--path-as-is"]
        return ["curl", "-sS", "--max-time", str(PATIENCE), *resolve, *options, f"https://{NAME}:{self.port}{path}"]

    def curl(self, path, *options):
        """Status, headers and body of an answer."""
        headers = self.folder / "headers.txt"
        done = subprocess.run(self.command(path, "-D", headers, *options), capture_output=True)
        assert done.returncode == 0, done.stderr.decode() + self.log.read_text()
        lines = headers.read_text().strip().split("\n\n")[-1].splitlines()
        fields = dict(line.split(": ", 1) for line in lines[1:])
        return int(lines[0].split()[1]), {name.lower(): value for name, value in fields.items()}, done.stdout

    def post(self, path, body, *options):
        data = ["-H", "Content-Type: application/json", "--data-binary", json.dumps(body)]
        return self.curl(path, *data, *options)

    def end(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def proxy_of(tmp_path, certificate):
    """Starts nginx in front of a service. It is ended after the test."""
    proxies = []

    def start(service):
        proxies.append(Proxy(tmp_path, certificate, service.address))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.end()


@pytest.fixture
def proxy(proxy_of, service):
    return proxy_of(service)


@pytest.fixture
def padding(tmp_path):
    """Writes a file of some bytes for the body of a request."""

    def write(size):
        (tmp_path / "padding").write_bytes(bytes(size))
        return tmp_path / "padding"

    return write


def test_an_image_is_the_one_without_the_proxy(proxy, service):
    status, headers, body = proxy.post("/v1/images/generations", IMAGE)
    assert (status, json.loads(body)["data"][0]["b64_json"]) == (200, service.generate(**IMAGE))
    assert headers["x-request-id"] in service.log.read_text()


def test_a_photograph_is_continued(proxy, photo):
    form = ["-F", f"image=@{photo}", "-F", "prompt=forest", "-F", "seed=3", "-F", "num_inference_steps=1"]
    status, _, body = proxy.curl("/v1/images/edits", *form)
    assert (status, len(json.loads(body)["data"])) == (200, 1)


def test_the_key_arrives(proxy_of, service_with_key):
    proxy = proxy_of(service_with_key)
    assert proxy.curl("/v1/models", "-H", f"Authorization: Bearer {service_with_key.key}")[0] == 200
    assert proxy.curl("/v1/models", "-H", "Authorization: Bearer another-key")[0] == 401
    assert proxy.curl("/v1/models")[0] == 401


def test_strips_are_not_buffered_and_a_client_that_goes_away_is_noticed(proxy, service):
    before = service.cancelled()
    body = {"prompt": "forest", "size": service.size(1000), "num_inference_steps": 50, "stream": True}
    command = proxy.command("/v1/images/generations", "-N", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        try:
            assert curl.stdout.readline() == "event: image_generation.partial_image\n"
            assert service.metric("eqim_pending_images") == 1
        finally:
            curl.kill()
    service.wait_until_idle()
    assert service.cancelled() == before + 1


@pytest.mark.parametrize("path, limit", [("/v1/images/generations", MIB), ("/v1/images/edits", 32 * MIB)])
def test_a_body_that_is_too_large_is_refused(proxy, padding, path, limit):
    for size in [limit + 1, 2 * limit, 40 * MIB]:
        status, _, body = proxy.curl(path, "--data-binary", f"@{padding(size)}")
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large"), size


def test_a_wrong_key_is_refused_with_a_large_picture_too(proxy_of, service_with_key, padding):
    """The service answers before it has read the body. The answer arrives nevertheless."""
    proxy, picture = proxy_of(service_with_key), padding(20 * MIB)
    for _ in range(5):
        status, _, body = proxy.curl(
            "/v1/images/edits", "-F", f"image=@{picture}", "-H", "Authorization: Bearer another-key"
        )
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")


def test_metrics_are_not_reachable(proxy, service):
    assert service.send("/metrics")[0] == 200
    for path in ["/metrics", "//metrics", "/%6detrics", "/v1/../metrics", "/metrics?x", "/metrics/", "/./metrics"]:
        status, _, body = proxy.curl(path)
        assert (status, json.loads(body)["error"]["code"]) == (404, "not_found"), path


def test_health_is_reachable(proxy):
    for path in ["/health/live", "/health/ready"]:
        assert proxy.curl(path)[0] == 200


def test_plain_http_is_redirected(proxy):
    command = ["curl", "-sS", "-H", f"Host: {NAME}", "-o", "/dev/null", "-w", "%{http_code} %{redirect_url}"]
    done = subprocess.run([*command, f"http://127.0.0.1:{proxy.plain_port}/v1/models"], capture_output=True, text=True)
    assert done.stdout == f"301 https://{NAME}/v1/models"


def test_too_many_requests_of_an_address_are_refused(proxy, tmp_path):
    """10 requests per second and 20 more are accepted."""
    headers = tmp_path / "all-headers.txt"
    command = proxy.command("/v1/models?[1-100]", "-D", headers, "-w", "\n%{http_code}\n")
    begun = time.monotonic()
    lines = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout.splitlines()
    seconds = time.monotonic() - begun
    accepted, refused = lines.count("200"), lines.count("429")
    assert accepted + refused == 100
    assert 21 <= accepted <= 22 + 10 * seconds
    assert headers.read_text().count("Retry-After: 1\n") == refused
    assert json.loads(lines[lines.index("429") - 1])["error"]["type"] == "rate_limit_error"
    assert proxy.curl("/health/ready")[0] == 200


def test_a_service_that_is_gone_is_an_error_in_the_envelope(proxy_of, start):
    service = start()
    proxy = proxy_of(service)
    assert service.end() == 0
    status, _, body = proxy.curl("/v1/models")
    assert (status, json.loads(body)["error"]["type"]) == (503, "server_error")


@pytest.fixture
def unit(tmp_path):
    """The unit with the path of the built program."""
    text, count = re.subn(r"^ExecStart=\S+", f"ExecStart={PROGRAMS}/eqim-serve", UNIT.read_text(), flags=re.MULTILINE)
    assert count == 1
    path = tmp_path / UNIT.name
    path.write_text(text)
    return path


def test_the_unit_is_correct(unit):
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


def test_the_unit_is_hardened(unit):
    """The exposure is 1.2 with systemd 252. The threshold is ten times the exposure."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_runs_with_the_flags_of_the_unit_and_without_new_machine_code(unit, start, tmp_path):
    """The kernel refuses memory that is writable and executable, as MemoryDenyWriteExecute does."""
    probe = [*NO_NEW_CODE, sys.executable, "-c", "import mmap; mmap.mmap(-1, 1, prot=7)"]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        pytest.skip("this kernel has no PR_SET_MDWE: Linux 6.3 has it")
    (tmp_path / "keys").write_text("a-key-of-the-unit\n")
    line = re.search(r"^ExecStart=\S+ --engine \S+ (.*)$", unit.read_text(), re.MULTILINE).group(1)
    service = start(*line.replace("%d", str(tmp_path)).split(), key="a-key-of-the-unit", runner=NO_NEW_CODE)
    assert service.generate(**IMAGE)
    assert service.end() == 0
