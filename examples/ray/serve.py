"""Serve images with Ray Serve.

Each replica opens the bundle once. Its requests share the batches of one engine.

    curl http://127.0.0.1:8000/ -d '{"class": "forest", "tokens": 32, "seed": 7}' -o forest.png
"""

import argparse
import asyncio
import json
import os
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from eqim import Engine, InputError
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


@serve.deployment(max_ongoing_requests=64)
class Images:
    """Generates an image per request: a JSON object as a line of `eqim-run --jobs`, without an id."""

    def __init__(self, bundle: str, **options: Any) -> None:
        self.engine = Engine.from_bundle(bundle, **options)

    async def __call__(self, request: Request) -> Response:
        try:
            job = await request.json()
        except ValueError as error:
            return JSONResponse({"error": f"the body is not JSON: {error}"}, 400)
        # A prefix is the path of a file.
        if isinstance(job, dict) and "prefix" in job:
            return JSONResponse({"error": "prefix is not a setting of this service"}, 400)
        try:
            # The image is cancelled if the client goes away.
            _, image = self.engine.submit_job(json.dumps(job))
            image = await asyncio.wrap_future(image)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Response(image._repr_png_(), media_type="image/png")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="folder of the bundle, at the same place on every node")
    add("--host", default="127.0.0.1", help="address to listen on [default: %(default)s]")
    add("--port", type=int, default=8000, help="port to listen on [default: %(default)s]")
    add("--replicas", type=int, default=1, metavar="N", help="processes, each with the model [default: %(default)s]")
    add("--cpus", type=int, default=1, metavar="N", help="CPUs of a replica, and threads of its model [default: %(default)s]")
    add("--gpus", type=float, default=0, metavar="N", help="GPUs of a replica [default: %(default)s]")
    add("--max-batch", type=int, default=16, metavar="N", help="most images in a batch of the model [default: %(default)s]")
    arguments = parser.parse_args()
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    images = Images.options(
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )
    images = images.bind(os.path.abspath(arguments.bundle), threads=arguments.cpus, max_batch=arguments.max_batch)
    try:
        serve.run(images, blocking=True)
    finally:
        # A cluster would go on serving.
        serve.shutdown()


if __name__ == "__main__":
    main()
