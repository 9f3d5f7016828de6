"""What the help of `layered` says about its stages and benchmarks. Imports nothing heavy: help must be quick.

Called by `commands`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What the help says about a stage."""

    summary: str
    description: str
    example: str


STAGES = {
    "prepare": Stage(
        summary="pictures and captions -> dataset",
        description="Reads pictures and captions (COCO's files, Parquet rows, or a folder of pictures with .txt files), crops\n"
        "and resizes the pictures, encodes the captions, and writes a dataset of Parquet files. What cannot be used is\n"
        "listed with its reason. Interrupted, the same command goes on where it was.",
        example="layered prepare --preset photo128 data.train_images=s3://bucket/train2017",
    ),
    "inspect": Stage(
        summary="what a dataset holds; --check: whether all of it is sound",
        description="Prints what a prepared dataset holds and how it was made, and writes a contact sheet of pictures with\n"
        "captions. With --check everything is read, and the exit code is 1 where something is not as the manifest says.",
        example="layered inspect datasets/demo --check",
    ),
    "train": Stage(
        summary="dataset -> model",
        description="Trains a layered model on a prepared dataset. The same command again goes on from the last\n"
        "checkpoint.",
        example="layered train --preset demo train.num_images=65536",
    ),
    "evaluate": Stage(
        summary="model and dataset -> scores",
        description="Draws pictures for captions of the validation split and scores them at every resolution. With --generated\n"
        "and --reference it scores a folder of anyone's pictures instead, and needs neither run nor dataset.",
        example="layered evaluate --run runs/demo evaluate.num_images=256\n"
        "  layered evaluate --generated samples/ --reference coco/val2017/ --extractor inception",
    ),
    "export": Stage(
        summary="checkpoint -> model",
        description="Writes the averaged weights of a run's newest checkpoint, or of another, as a model's directory. Training\n"
        "does so by itself at its end. `layered sample` and `layered serve` take the directory as --run, with a --preset.",
        example="layered export runs/coco512 --num-images 5000000 --output models/early",
    ),
    "status": Stage(
        summary="how far a run, or a dataset, is",
        description="Tells from a run's directory, wherever it is trained: pictures seen, speed and time left, losses,\n"
        "the newest checkpoint, scores, the model; of a dataset what it holds, or how far it is. Starts no Ray.",
        example="layered status s3://bucket/runs/1",
    ),
    "report": Stage(
        summary="run -> one page with curves, pictures and scores",
        description="Writes one HTML page about a run, finished or not: curves of all that was logged, grids of samples,\n"
        "scores, configuration and environment. The page needs no other file and no network.",
        example="layered report runs/demo",
    ),
    "sample": Stage(
        summary="model and a prompt -> pictures",
        description="Draws pictures of a prompt at every resolution, as PNG files and one sheet. With --server a server of\n"
        "`layered serve` draws them, at one resolution, and neither run nor preset is needed; an API key is read from the\n"
        "environment's LAYERED_API_KEY.",
        example='layered sample "a red apple" --run runs/demo --seed 7\n'
        '  layered sample "a red apple" --server http://127.0.0.1:8000 --size 32',
    ),
    "serve": Stage(
        summary="model -> a page, and an HTTP interface as OpenAI's",
        description="Draws for others over HTTP on Ray Serve: a page for people, the OpenAI images API for programs, previews\n"
        "while a picture is being drawn. Ends when it is interrupted. A model that is exported anew is picked up.",
        example="layered serve --run runs/demo serve.port=8080",
    ),
    "demo": Stage(
        summary="prepare, train, evaluate and sample the embedded pictures",
        description="Runs prepare, train, evaluate and sample as jobs of a local Ray, or inside a job one after the other.\n"
        "Interrupted, it goes on where it was.",
        example="layered demo",
    ),
    "ablate": Stage(
        summary="an experiment -> its cells' scores, and a report",
        description="Trains and evaluates every cell of an experiment with several seeds, side by side as far as there is room,\n"
        "and reports what differs by more than chance. What is there is not run again, so an interrupted run goes on.",
        example="layered ablate e2 --preset demo\n"
        "  layered ablate e2 --scale full --dataset s3://bucket/coco --store s3://bucket/ablate",
    ),
    "submit": Stage(
        summary="a stage as a job of a Ray cluster",
        description="Sends a stage, or several one after the other, to a Ray cluster as one job, and prints the `ray job\n"
        "submit` line that it stands for. Everything is checked before anything is sent. With --wait the log is shown, and the\n"
        "exit code is the job's own; Ctrl-C then leaves the job alone. What a stage takes says `layered STAGE --help`.",
        example="layered submit prepare,train,evaluate --preset coco512 --dataset s3://bucket/coco --run s3://bucket/runs/1 \\\n"
        "      --address http://head:8265 --wait",
    ),
    "bench": Stage(
        summary="speed and memory of networks, and of the stages",
        description="Measures the networks of presets of shape (64T, 128S, 256S, S, B, L) beside the single-scale network\n"
        "and diffusers' U-Net of equal multiply-adds, in one run. Reads no configuration. `layered bench prepare`,\n"
        "`layered bench loader`, `layered bench train`, `layered bench serve` and `layered bench fid` measure those; each\n"
        "has its own --help.",
        example="layered bench 64T --threads 1 --output bench.json",
    ),
    "config": Stage(
        summary="print a resolved configuration",
        description="Prints what a stage would be run with.",
        example="layered config --preset coco512 train.num_workers=16",
    ),
}

BENCHES = {
    "prepare": Stage(
        summary="",
        description="Measures prepare on made-up pictures of COCO's sizes beside its work alone in a pool of processes, and the\n"
        "memory it takes. Settings are those of the preset coco512.",
        example="layered bench prepare --num-images 5000 20000 model.resolutions=[64,128,256]",
    ),
    "train": Stage(
        summary="",
        description="Measures training under Ray Train beside a bare PyTorch loop on the same batches, with as many threads.",
        example="layered bench train --workers 1 2 --threads 2",
    ),
    "fid": Stage(
        summary="",
        description="Measures the Frechet distance beside scipy.linalg.sqrtm, in time and in error, and the Inception network\n"
        "beside torch-fidelity's, where an interpreter that has it is named.",
        example="layered bench fid --oracle-python .venv-oracles/bin/python",
    ),
    "serve": Stage(
        summary="",
        description="Measures serving over HTTP on a local Ray: images/s beside the bare pipeline, waiting times beside the\n"
        "same server with Ray Serve's @serve.batch, first previews, and with --soak an overload. Random weights.",
        example="layered bench serve --threads 1 --rounds 5 --soak 600",
    ),
    "loader": Stage(
        summary="",
        description="Measures the training loader beside decoding alone and beside other loaders that are installed.",
        example="layered bench loader --dataset datasets/coco --batch-size 64",
    ),
}
"""What `bench` measures beside networks."""
