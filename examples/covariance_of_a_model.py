"""The second moment of the inputs of any linear layer: collect it with a hook, save it, factor it.

    python examples/covariance_of_a_model.py --output moment.safetensors --model ./Llama-3-8B --text wiki.txt

Without --model and --text it takes the small model that ships with the package. For the projections of supported
models `fastedit covariance` does this faster, for several layers in one pass.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import StreamingCovariance, ops
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", required=True)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--module", default="model.layers.5.mlp.down_proj", help="path of a linear layer")
parser.add_argument("--text", type=Path, help="UTF-8, one document a line")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
layer = model.get_submodule(args.module)
moment = StreamingCovariance(layer.in_features)
layer.register_forward_pre_hook(lambda _, inputs: moment.update(inputs[0].flatten(0, 1), mask))

texts = args.text.read_text("utf-8").splitlines() if args.text else World().prose(200)
for start in range(0, len(texts), 16):
    batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True, return_token_type_ids=False)
    mask = batch["attention_mask"].bool().flatten()  # padding does not count
    with torch.no_grad():
        model(**batch)

moment.save(args.output)
moment = StreamingCovariance.load(args.output)
C = moment.finalize()  # [d, d] fp64, the mean of k kᵀ
L = ops.factor_covariance(C, count=moment.count)  # C = L Lᵀ; ops.rank_k_update takes it
print(f"{moment.count} tokens, width {moment.dim}, ‖L Lᵀ − C‖ / ‖C‖ = {((L @ L.T - C).norm() / C.norm()).item():.1e}")
