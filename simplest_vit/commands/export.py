"""Write the best checkpoint of a run as one file that other runtimes can load.

    simplest-vit export --workdir runs/mine --output model.onnx

stablehlo and onnx take uint8 images [batch, H, W, C] and normalize them inside the graph. safetensors holds
only arrays; its metadata describe how to normalize images. Class names are in the metadata: in FILE.json for stablehlo,
in the file itself for onnx and safetensors. pth holds what the PyTorch reference loads: parameters and E-SPA's
constants. docs/export.md shows how to load each format.
"""

from absl import flags

from simplest_vit import cli


def main() -> None:
    """Run the command."""
    output = cli.define_path("output", None, "The file to write; it must not exist.")
    format = flags.DEFINE_string("format", None, "stablehlo, onnx, safetensors or pth; by default the output's suffix.")

    def export() -> None:
        from simplest_vit.export import export

        export(str(cli.WORKDIR.value), str(output.value), format.value)
        print(output.value)

    usage = "simplest-vit export --workdir FOLDER --output FILE.(stablehlo|onnx|safetensors|pth)"
    cli.run(export, usage, required=("workdir", "output"))
