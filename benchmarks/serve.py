"""Latency of the encoder of queries: eager, ONNX Runtime and OpenVINO, at two batch sizes; the last line is one JSON
object.

    python benchmarks/serve.py --encoder=SASRec --items=3416 --length=50

Weights are random, histories full. An engine that is not installed is left out. Times are medians in milliseconds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import records
import timing
import torch
from untrained import recommender

from generative_recommenders.retrieval.export import export_program, query_inputs, write_onnx
from generative_recommenders.retrieval.recommender import Recommender

Encode = Callable[[dict[str, torch.Tensor]], object]


def engines(rec: Recommender, folder: Path) -> dict[str, Encode]:
    def eager(inputs: dict[str, torch.Tensor]) -> object:
        with torch.no_grad():
            return rec.model.encode_query(inputs).states

    found: dict[str, Encode] = {"eager": eager}
    if find_spec("onnxscript") is None:
        return found
    path = folder / "encoder.onnx"
    write_onnx(export_program(rec), path, list(query_inputs(rec)))
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found["onnxruntime"] = lambda inputs: session.run(None, {n: x.numpy() for n, x in inputs.items()})
    if find_spec("openvino") is not None:
        import openvino

        config = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(path, "CPU", config)
        found["openvino"] = lambda inputs: compiled({n: x.numpy() for n, x in inputs.items()})
    return found


def main() -> None:
    parser = records.parser_of(__doc__, items=3416, length=50, repeats=50, seed=0)
    parser.add_argument("--encoder", default="SASRec")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    bindings = {"train_fn.main_module": args.encoder, "train_fn.max_sequence_length": args.length}
    rec, results = recommender(args.items, bindings), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, encode in engines(rec, Path(folder)).items():
            results[name] = {}
            for batch in (1, 32):
                inputs = query_inputs(rec, batch, args.length)
                inputs["item_ids"] = torch.randint(1, args.items + 1, (batch, args.length))
                times = timing.seconds_of(partial(encode, inputs), args.repeats, warmup=3)
                results[name][f"batch_{batch}_ms"] = round(1000 * statistics.median(times), 3)
            print(name, results[name], flush=True)
    setup = vars(args) | {"threads": torch.get_num_threads()}
    records.finish({"setup": setup, "results": results})


if __name__ == "__main__":
    main()
