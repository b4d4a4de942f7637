"""OpenAI's Python package as the client: images, streams, edits, models, errors, retries and clients that go away."""

import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from conftest import PATIENCE, png_size, until

# Parameters that OpenAI's API does not have. An image takes little time.
SHORT = {"seed": 3, "num_inference_steps": 2}
# An image that takes longer than any test.
ENDLESS = {"num_inference_steps": 50}


def client_of(service, **options):
    """A client of a service. It does not repeat requests, unless it is told to."""
    options = {"api_key": service.key or "none", "max_retries": 0, "timeout": PATIENCE, **options}
    return openai.OpenAI(base_url=f"{service.url}/v1", **options)


@pytest.fixture
def client(service):
    with client_of(service) as client:
        yield client


@pytest.fixture(scope="module")
def narrow(start):
    """A service which generates one image at a time, of any length. No other image waits."""
    return start("--max-batch", "1", "--max-queue", "0", "--max-tokens", "100000")


@contextmanager
def endless(service):
    """A stream of an image that does not end. Another image is refused until the stream is closed."""
    size = service.size(50_000)
    with client_of(service) as client:
        with client.images.generate(prompt="none", size=size, stream=True, extra_body=ENDLESS) as stream:
            next(stream)
            yield stream


def file_of(image):
    return base64.b64decode(image.b64_json)


def check_stream(stream, whole):
    """Checks that a stream has partial images, and that its last event is the whole image."""
    *partial, last = stream
    assert partial and last.type.endswith(".completed"), last.type
    for index, event in enumerate(partial):
        assert event.type.endswith(".partial_image")
        assert event.partial_image_index == index
        assert png_size(file_of(event)) == event.size
    assert file_of(last) == file_of(whole)


def test_an_image_has_the_size_and_the_bytes_of_its_seed(client, service):
    size = service.size(5)
    answers = [client.images.generate(prompt="forest", size=size, extra_body=SHORT) for _ in range(2)]
    files = [file_of(answer.data[0]) for answer in answers]
    assert png_size(files[0]) == size
    assert files[0] == files[1]
    other = client.images.generate(prompt="forest", size=size, extra_body={**SHORT, "seed": 4})
    assert file_of(other.data[0]) != files[0]


def test_several_images_have_the_seeds_that_follow(client, service):
    answer = client.images.generate(prompt="sky", size=service.size(3), n=3, extra_body=SHORT)
    assert [image.seed for image in answer.data] == [3, 4, 5]
    assert len({image.b64_json for image in answer.data}) == 3


def test_a_stream_ends_with_the_image(client, service):
    image = {"prompt": "water", "size": service.size(20), "extra_body": SHORT}
    whole = client.images.generate(**image).data[0]
    assert png_size(file_of(whole)) == image["size"]
    check_stream(client.images.generate(**image, stream=True, partial_images=3), whole)


def test_a_photograph_is_continued(client, photo):
    def edit(**options):
        with open(photo, "rb") as file:
            return client.images.edit(image=file, prompt="mountain", extra_body=SHORT, **options)

    first, second = edit().data[0], edit().data[0]
    assert png_size(file_of(first)) == first.size
    assert file_of(first) == file_of(second)
    check_stream(edit(stream=True, partial_images=3), first)


def test_models_are_listed(client):
    model = client.models.list().data[0]
    assert (model.id, model.object) == ("bundle", "model")
    assert client.models.retrieve("bundle") == model
    image = client.images.generate(model="bundle", prompt="none", extra_body=SHORT)
    assert file_of(image.data[0]) == file_of(client.images.generate(prompt="none", extra_body=SHORT).data[0])


@pytest.mark.parametrize(
    "param, parameters",
    [
        ("prompt", {"prompt": "sea"}),
        ("size", {"size": "1024x1"}),
        ("n", {"n": 11}),
        ("quality", {"quality": "hd"}),
        ("guidance_scale", {"extra_body": {"guidance_scale": -1}}),
    ],
)
def test_a_wrong_parameter_is_named(client, param, parameters):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "forest", **parameters})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert caught.value.body["message"].startswith(param)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="forest", model="dall-e-3")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


def test_a_file_that_is_not_a_picture_is_refused(client):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.edit(image=b"not a picture", prompt="forest")
    assert caught.value.param == "image"


def test_a_wrong_key_is_refused(service_with_key):
    with client_of(service_with_key, api_key="another-key") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.images.generate(prompt="forest", extra_body=SHORT)
        assert caught.value.code == "invalid_api_key"
    with client_of(service_with_key) as client:
        assert client.images.generate(prompt="forest", extra_body=SHORT).data


def test_a_full_queue_is_a_rate_limit(narrow):
    with endless(narrow), client_of(narrow) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="forest", extra_body=SHORT)
    assert caught.value.response.headers["retry-after"] == "1"
    narrow.wait_until_idle()


def test_the_retries_of_the_package_succeed_when_the_queue_empties(narrow):
    def refused():
        return narrow.metric("eqim_requests_total", route="/v1/images/generations", status="429")

    before = refused()
    retrying = client_of(narrow, max_retries=openai.DEFAULT_MAX_RETRIES)
    with retrying, ThreadPoolExecutor() as pool:
        with endless(narrow):
            answer = pool.submit(retrying.images.generate, prompt="forest", extra_body=SHORT)
            until(lambda: refused() > before, "a refused request")
        assert file_of(answer.result(PATIENCE).data[0])
    assert refused() > before


def test_a_closed_stream_cancels_its_image(narrow):
    before = narrow.cancelled()
    with endless(narrow):
        assert narrow.metric("eqim_pending_images") == 1
    narrow.wait_until_idle()
    assert narrow.cancelled() == before + 1


def test_a_timeout_of_the_client_cancels_its_image(narrow):
    before = narrow.cancelled()
    with client_of(narrow, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt="forest", size=narrow.size(50_000), extra_body=ENDLESS)
    narrow.wait_until_idle()
    assert narrow.cancelled() == before + 1
