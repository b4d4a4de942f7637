"""Requests of the hostile tests: correct ones, and malformed ones of many kinds.

Each function of OF_HTTP and NOT_OF_HTTP makes a request of its kind from random numbers.
"""

import json

MIB = 1 << 20
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
IMAGE = {"prompt": "forest", "seed": 3, "num_inference_steps": 1}
BORDER = "a-border"
FORM = f"multipart/form-data; boundary={BORDER}"


def message(method, path, body=b"", **headers):
    """The bytes of a request. Underscores in names of headers are hyphens."""
    headers = {"Host": "127.0.0.1", "Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value is not None]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def generation(body):
    return message("POST", GENERATIONS, json.dumps(body).encode(), Content_Type="application/json")


def form(*fields):
    """A form of names and values. A picture is a file."""
    parts = []
    for name, value in fields:
        file = b'; filename="photo.png"' if name == "image" else b""
        parts.append(
            b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (BORDER.encode(), name.encode(), file, value)
        )
    return b"".join(parts) + f"--{BORDER}--\r\n".encode()


def edit(body, kind=FORM):
    return message("POST", EDITS, body, Content_Type=kind)


# Each of the following functions makes a request of its kind. HTTP is respected: the answer has the envelope.


def cut_json(random):
    body = json.dumps(IMAGE).encode()
    return message("POST", GENERATIONS, body[: random.randrange(len(body))], Content_Type="application/json")


def json_of_wrong_types(random):
    wrong = {
        "prompt": [None, True, -1, 1.5, [], {}, "", "sea", "0:0-2", "0:5-2", 1 << 70, "\0"],
        "seed": ["3", -1, 1.5, [], 1 << 64],
        "n": [0, 11, -1, "1", [1]],
        "size": [7, "0x0", "x", "-1x256", "1e3x256", f"{1 << 70}x256", "16x16x16", []],
        "num_inference_steps": [0, -1, 1 << 40, "1", 1.5],
        "guidance_scale": [-1, "3", [], 1e300],
        "solver": ["fast", 1, {}],
        "output_format": ["gif", 1],
        "response_format": ["url", 1],
        "stream": ["true", 1],
        "partial_images": [-1, "1"],
        "model": ["dall-e-3", 3, "../bundle"],
        "mask": ["x", 1],
        "direction": ["left", "up"],
        "keep_prefix_pixels": [True, 1],
    }
    name = random.choice(list(wrong))
    return generation({**IMAGE, name: random.choice(wrong[name])})


def json_that_is_no_object(random):
    bodies = [
        b"",
        b"[]",
        b"null",
        b"3",
        b'"forest"',
        b"[" * 10_000,
        b'{"prompt":' * 10_000,
        b'{"prompt": 0, "prompt": 1}',
        b"\xef\xbb\xbf{}",
    ]
    return message("POST", random.choice([GENERATIONS, f"{GENERATIONS}/img_0/classes"]), random.choice(bodies))


def json_that_is_no_text(random):
    body = bytearray(json.dumps({**IMAGE, "user": "x" * 50}).encode())
    body[body.index(b"xx") + random.randrange(50)] = random.randrange(0x80, 0x100)
    return message("POST", GENERATIONS, bytes(body), Content_Type="application/json")


def wrong_method(random):
    method = random.choice(["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "SPY"])
    return message(method, random.choice([GENERATIONS, EDITS, f"{GENERATIONS}/img_0/classes"]))


def wrong_path(random):
    name = random.choice([random.randbytes(9).hex(), "%ff", "%00", "..%2f..%2fetc%2fpasswd", "%", "a" * 10_000, "%22%3C%3E"])
    path = random.choice(["/v1/{}", "/v1/models/{}", "/v1/models/{}/x", GENERATIONS + "/{}", "/health/{}", "/metrics/{}"])
    return message(random.choice(["GET", "POST"]), path.format(name))


def image_that_does_not_exist(random):
    name = random.choice([f"img_{random.randbytes(16).hex()}", "%ff", "%00", "x" * 1000])
    return message("POST", f"{GENERATIONS}/{name}/classes", b'{"prompt": 0}', Content_Type="application/json")


def wrong_content_type(random):
    kind = random.choice(
        [
            None,
            "",
            "application/json",
            "text/plain",
            "multipart/form-data",
            "multipart/mixed; boundary=a",
            "\xff",
            FORM + "x",
        ]
    )
    return edit(form(("image", b"x"), ("prompt", b"0")), kind)


def cut_form(random):
    body = form(("prompt", b"0"), ("image", random.randbytes(100)))
    return edit(body[: random.randrange(len(body))])


def bad_form(random):
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x02\0\0\0" + random.randbytes(30)
    picture = random.choice([b"", b"GIF89a", png, b"\xff\xd8\xff" + random.randbytes(100), random.randbytes(1000)])
    others = [
        ("prompt", b"0"),
        ("prompt", b"\xff"),
        ("image", b"x"),
        ("direction", b"up"),
        ("n", b"[" * 1000),
        ("", b""),
        ("\0", b"1"),
    ]
    return edit(form(("image", picture), *random.choices(others, k=random.randrange(5))))


def form_of_random_bytes(random):
    return edit(f"--{BORDER}\r\n".encode() + random.randbytes(random.randrange(1000)))


# The following kinds do not respect HTTP: the answer can have no body, or the connection is closed.


def random_bytes(random):
    return random.randbytes(random.randrange(1, 2000)) + b"\r\n\r\n"


def bad_first_line(random):
    lines = [
        "GET",
        "GET  /",
        "GET / HTTP/9.9",
        "/ GET HTTP/1.1",
        "GET http:// HTTP/1.1",
        "GET /\0 HTTP/1.1",
        f"GET /{'x' * 70_000} HTTP/1.1",
        "GET \xe9 HTTP/1.1",
        "",
    ]
    return random.choice(lines).encode("latin-1") + b"\r\nHost: 127.0.0.1\r\n\r\n"


def bad_headers(random):
    headers = [
        "No-Colon",
        "Space : x",
        ": x",
        "Nul: \0",
        "Content-Length: -1",
        "Content-Length: x",
        "Content-Length: 1\r\nContent-Length: 2",
        "Transfer-Encoding: gzip",
        f"Content-Length: {1 << 64}",
        "Folded: x\r\n y",
        "Large: " + "x" * random.randrange(500_000, MIB),
        "X: y\r\n" * 200 + "Y: z",
    ]
    return f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\n{random.choice(headers)}\r\n\r\n".encode()


def bad_chunks(random):
    chunks = [
        b"x\r\n",
        b"-1\r\n",
        b"f" * 17 + b"\r\n",
        b"5\r\n{}",
        b"2\r\n{}0\r\n\r\n",
        b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
        b"\r\n\r\n",
        random.randbytes(50),
    ]
    path, kind = random.choice([(GENERATIONS, "application/json"), (EDITS, FORM)])
    return message("POST", path, Content_Type=kind, Content_Length=None, Transfer_Encoding="chunked") + random.choice(chunks)


def body_that_ends_early(random):
    path, kind = random.choice([(GENERATIONS, "application/json"), (EDITS, FORM)])
    return message("POST", path, Content_Type=kind, Content_Length=random.randrange(200, MIB)) + random.randbytes(100)


OF_HTTP = [
    cut_json,
    json_of_wrong_types,
    json_that_is_no_object,
    json_that_is_no_text,
    wrong_method,
    wrong_path,
    image_that_does_not_exist,
    wrong_content_type,
    cut_form,
    bad_form,
    form_of_random_bytes,
]
NOT_OF_HTTP = [random_bytes, bad_first_line, bad_headers, bad_chunks, body_that_ends_early]
