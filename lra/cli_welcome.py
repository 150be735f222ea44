"""What ``caffe-lra`` alone prints, and its commands in the order in which they are needed."""

from __future__ import annotations

import click

WELCOME = """\
caffe-lra makes legacy Caffe networks fast again. NET is a prototxt of any
age, WEIGHTS its .caffemodel or .caffemodel.h5. To begin with:

  caffe-lra demo
      see it all on a small net that is here already
  caffe-lra info NET WEIGHTS
      what each layer costs, and how much of its rank it uses
  caffe-lra decompose NET WEIGHTS -o fast --speedup 2 --time
      fast.prototxt and fast.caffemodel with half the multiplications, timed
  caffe-lra prune NET WEIGHTS -o small --speedup 2 --criterion l1
      the same by leaving out filters
  caffe-lra report fast NET WEIGHTS -o fast.html
      a page about what has changed
  caffe-lra export fast.prototxt fast.caffemodel -o fast.onnx
      ONNX, for use elsewhere

All commands: caffe-lra -h. One of them: caffe-lra COMMAND -h."""

SECTIONS = {
    "Look": {
        "info": "layers, shapes, parameters, MACs, ranks",
        "diff": "two nets layer by layer",
        "report": "a page about what was changed",
        "demo": "all of it on a small net that is here",
    },
    "Change": {
        "decompose": "layers into cheaper chains",
        "prune": "filters away",
        "apply": "a plan to a sibling of its net",
        "export": "to ONNX",
    },
    "Run": {
        "run": "forward, blobs to a file",
        "time": "nets side by side",
        "eval": "accuracy on images",
    },
    "Train": {
        "train": "by a solver file",
        "data": "build LMDBs and mean files",
    },
    "Convert": {
        "deploy": "a train_val to a deploy net",
        "upgrade": "old files to today's form",
        "recover": "the net that weights embed",
    },
    "Shell": {
        "completion": "script for bash, zsh or fish",
    },
}


class Sections(click.Group):
    """A group that lists its commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every section's commands with a few words each."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:10}", said) for name, said in commands.items()])
