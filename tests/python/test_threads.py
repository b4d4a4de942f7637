"""Threads, processes, signals and the end of the interpreter."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import numpy as np
import pytest
from conftest import BUNDLE, PATIENCE, PHOTO, levels, printed, python

import eqim

# An image that takes longer than any test.
LONG = {"tokens": 30_000, "num_inference_steps": 100}


def test_eight_threads_share_an_engine(engine):
    settings = [
        {"class_": index % 5, "seed": index, "tokens": 3 + index % 4, "guidance_scale": 1 + index % 2}
        for index in range(24)
    ]
    settings = [{**one, "num_inference_steps": 5} for one in settings]
    alone = [engine.generate(**one) for one in settings]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda one: engine.generate(**one), settings))
    for image, other in zip(together, alone):
        assert levels(image, other) <= 1
    assert np.array_equal(engine.generate(**settings[7]).pixels, alone[7].pixels)


def test_threads_mix_all_methods(engine):
    photo = engine.generate(tokens=3, num_inference_steps=1)
    latents = engine.encode(photo)
    work = {
        "generate": lambda: engine.generate(tokens=4, num_inference_steps=2),
        "outpaint": lambda: engine.outpaint(photo, tokens=5, num_inference_steps=2),
        "stream": lambda: [strip.pixels for strip in engine.stream(tokens=30, tile=8, num_inference_steps=2)][-1],
        "submit": lambda: engine.submit(tokens=3, num_inference_steps=2).result(),
        "encode": lambda: engine.encode(photo),
        "decode": lambda: engine.decode(latents),
    }
    alone = {name: np.array(one()) for name, one in work.items()}
    names = [name for _ in range(6) for name in work]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda name: np.array(work[name]()), names))
    for name, result in zip(names, together):
        if name == "encode":
            assert np.allclose(result, alone[name], atol=1e-4)
        else:
            assert levels(result, alone[name]) <= 1


def ticks_during(work):
    """How often the main thread ran while another thread works, once per millisecond at most."""
    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    return ticks


@pytest.mark.parametrize("name", ["generate", "outpaint", "stream", "encode", "decode", "open"])
def test_python_runs_while_the_engine_works(engine, name):
    pixels = np.zeros((engine.height, 200 * engine.token_width, 3), np.uint8)
    latents = np.zeros((250, engine.embed_dim), np.float32)
    work = {
        "generate": lambda: engine.generate(tokens=100),
        "outpaint": lambda: engine.outpaint(pixels, tokens=202),
        "stream": lambda: list(engine.stream(tokens=100)),
        "encode": lambda: engine.encode(pixels),
        "decode": lambda: engine.decode(latents),
        "open": lambda: eqim.Engine.from_bundle(BUNDLE).close(),
    }
    # Each takes more than 50 ms. Were the lock not released, there would be one tick.
    assert ticks_during(work[name]) >= 5


CONTROL_C = """
import os, signal, sys, threading, time
import eqim

engine = eqim.Engine.from_bundle(sys.argv[1])
# A method in C as the callback: Python runs no code between two tokens, in which it would see the signal.
tokens = {}
seen = []

def interrupt():
    while len(tokens) < 10:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    seen.append(len(tokens))

threading.Thread(target=interrupt).start()
try:
    engine.generate(tokens=20_000, tile=1000, num_inference_steps=1, callback=tokens.__setitem__)
except KeyboardInterrupt:
    print(len(tokens) - seen[0])
# The image is cancelled: the engine is free.
engine.generate(tokens=2, num_inference_steps=1)
"""


def test_control_c_stops_within_tokens():
    # Two tokens can be on their way when the signal comes.
    assert int(printed(CONTROL_C, BUNDLE)) <= 3


@pytest.mark.parametrize(
    "call",
    [
        "engine.generate(**long)",
        "list(engine.stream(**long))",
        "engine.outpaint(photo, **long)",
        "engine.submit(**long).result()",
    ],
)
def test_control_c_ends_a_program(call):
    script = f"""
import sys
import eqim
engine, long, photo = eqim.Engine.from_bundle(sys.argv[1]), {LONG}, sys.argv[2]
engine.generate(tokens=2, num_inference_steps=1)
print("begins", flush=True)
{call}
"""
    command = [sys.executable, "-c", script, str(BUNDLE), str(PHOTO)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors, errors
    # The image would take minutes.
    assert time.monotonic() - start < 20


FORK = """
import os, signal, sys, warnings
import eqim

# Python warns about any fork of a process with threads.
warnings.simplefilter("ignore", DeprecationWarning)
engine = eqim.Engine.from_bundle(sys.argv[1])
stream = engine.stream(tokens=150, num_inference_steps=2)
next(stream)
image = engine.generate(tokens=2, num_inference_steps=1)
child = os.fork()
if not child:
    # What hangs ends the process.
    signal.alarm(60)
    calls = {
        "generate": lambda: engine.generate(tokens=2),
        "outpaint": lambda: engine.outpaint(image),
        "stream": lambda: engine.stream(tokens=2),
        "submit": lambda: engine.submit(tokens=2),
        "encode": lambda: engine.encode(image),
        "decode": lambda: engine.decode(image.tokens),
        "next": lambda: next(stream),
        "amend": lambda: stream.amend(class_=1),
    }
    for name, call in calls.items():
        try:
            call()
        except eqim.ClosedError as error:
            assert str(os.getpid()) in str(error), error
        else:
            print(name, "raised nothing")
    # Other attributes, the image and the ways to end stay.
    assert engine.class_names and image.pixels.shape == (256, 32, 3)
    image.save(sys.argv[2])
    stream.close()
    engine.close()
    with eqim.Engine.from_bundle(sys.argv[1]) as own:
        own.generate(tokens=2, num_inference_steps=1)
    print("child", flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
engine.generate(tokens=2, num_inference_steps=1)
strips = list(stream)
assert strips and stream.image is not None
print("parent")
"""


def test_a_fork_gets_a_clear_error(tmp_path):
    assert printed(FORK, BUNDLE, tmp_path / "image.png").split() == ["child", "parent"]


SPAWN = """
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
import eqim

def pixels(engine, seed):
    assert engine.backend == "Candle"
    return engine.generate(tokens=2, seed=seed, num_inference_steps=1).pixels

if __name__ == "__main__":
    # The option is not the default: it must come along.
    engine = eqim.Engine.from_bundle(sys.argv[1], backend="candle", max_batch=2)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        images = list(processes.map(pixels, [engine] * 4, range(4)))
    for seed, image in enumerate(images):
        assert np.array_equal(image, pixels(engine, seed))
    print("equal")
"""


def test_an_engine_is_pickled_to_a_process(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    command = [sys.executable, str(script), str(BUNDLE)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0 and process.stdout == "equal\n", process.stderr


def test_a_pickled_engine_is_open_again(own):
    expected = own.generate(tokens=2, num_inference_steps=1)
    data = pickle.dumps(own)
    own.close()
    with pickle.loads(data) as again:
        assert np.array_equal(again.generate(tokens=2, num_inference_steps=1).pixels, expected.pixels)


@pytest.mark.parametrize("in_stream", [False, True])
def test_close_stops_what_runs(own, in_stream):
    caught = []

    def work():
        try:
            list(own.stream(**LONG)) if in_stream else own.generate(**LONG)
        except eqim.ClosedError as error:
            caught.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    future = own.submit(**LONG)
    time.sleep(0.3)
    own.close()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(caught) == 3
    with pytest.raises(eqim.ClosedError):
        future.result(PATIENCE)
    assert own.closed
    own.close()


def test_close_in_a_callback(own):
    with pytest.raises(eqim.ClosedError):
        own.generate(callback=lambda known, total: own.close(), **LONG)


def test_a_cancelled_future_frees_the_engine(engine):
    futures = [engine.submit(**LONG) for _ in range(3)]
    time.sleep(0.2)
    for future in futures:
        assert future.cancel() and future.cancelled()
    assert wait(futures, PATIENCE).not_done == set()
    with pytest.raises(CancelledError):
        futures[0].result()
    # Images that run would wait for minutes if those were not cancelled.
    engine.submit(tokens=2, num_inference_steps=1).result(PATIENCE)


def test_callbacks_of_futures(engine):
    results = []
    called = threading.Event()

    def done(future):
        results.append(future.result())
        called.set()

    engine.submit(tokens=2, num_inference_steps=1).add_done_callback(done)
    assert called.wait(PATIENCE) and results[0].width == 2 * engine.token_width


def test_futures_outlive_their_engine():
    futures = [eqim.Engine.from_bundle(BUNDLE).submit(tokens=3, num_inference_steps=1) for _ in range(3)]
    assert [future.result(PATIENCE).width for future in futures] == [48, 48, 48]


@pytest.mark.parametrize(
    "running",
    [
        "stream = engine.stream(**long); next(stream)",
        "futures = [engine.submit(**{**long, 'seed': seed}) for seed in range(4)]",
        "threading.Thread(target=engine.generate, kwargs=long, daemon=True).start()",
        "threading.Thread(target=lambda: list(engine.stream(**long)), daemon=True).start()",
        "threading.Thread(target=engine.generate, kwargs={**long, 'callback': print}, daemon=True).start()",
        "engine.submit(**long); del engine",
        "engine.generate(tokens=2, num_inference_steps=1); del engine",
        "engine.generate(tokens=2, num_inference_steps=1); sys.exit(0)",
        "engine.close()",
        "keep = [engine]; keep.append(keep)",
    ],
)
@pytest.mark.parametrize("pause", [0, 0.2])
def test_the_interpreter_ends_while_the_engine_works(running, pause):
    script = f"""
import sys, threading, time
import eqim
engine, long = eqim.Engine.from_bundle(sys.argv[1]), {LONG}
{running}
time.sleep({pause})
"""
    process = python(script, BUNDLE)
    assert process.returncode == 0, process.stderr
    assert "panicked" not in process.stderr and "Fatal" not in process.stderr, process.stderr


def test_memory_does_not_grow(engine):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work(count):
        for seed in range(count):
            engine.generate(tokens=2, seed=seed, num_inference_steps=1)
            engine.submit(tokens=2, seed=seed, num_inference_steps=1).result()
            next(engine.stream(tokens=20, tile=4, seed=seed, num_inference_steps=1))

    work(30)
    before = resident()
    work(100)
    # An image of 2 tokens has 25 kB, so that 200 images would be 5 MB, and its tiles and caches more.
    assert resident() - before < 30e6
