"""Checks ONNX graphs, their types, shapes and external data, with the onnx package.

Usage: PYTHONPATH=.native/python python3 tests/check_onnx.py GRAPH.onnx...
"""

import os
import sys
import tempfile

import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.shape_inference


def check(path):
    """Raises an exception if the graph at `path` is invalid."""
    onnx.checker.check_model(path, full_check=True)
    # The full check does not compare a tensor's size with its external data; this does.
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        onnx.numpy_helper.to_array(tensor, base_dir=os.path.dirname(path))
    # The full check does not propagate shapes that the graph computes; this does.
    with tempfile.TemporaryDirectory() as folder:
        onnx.shape_inference.infer_shapes_path(
            path,
            os.path.join(folder, "inferred.onnx"),
            check_type=True,
            strict_mode=True,
            data_prop=True,
        )


def main(paths):
    """Checks every graph and returns the exit code."""
    if not paths:
        print("no graph given: expected one or more .onnx paths", file=sys.stderr)
        return 1
    failed = False
    for path in paths:
        try:
            check(path)
            print(f"OK {os.path.basename(path)}")
        except Exception as problem:  # onnx raises errors of many unrelated classes
            print(f"FAILED {path}: {problem}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
