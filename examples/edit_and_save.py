"""Edit a model, save it, load it again with plain transformers, and ask it.

    python examples/edit_and_save.py --output ./edited --model ./Llama-3-8B --requests facts.json

Without --model and --requests it makes edits of the small model that ships with the package.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import Editor, load_requests
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--requests", help="file of edits")
parser.add_argument("--n", type=int, default=20, help="edits to make, if no file is given")
parser.add_argument("--output", required=True, help="folder of the edited checkpoint")
parser.add_argument("--dtype", default="float32", help="of the weights; auto is the checkpoint's own")
args = parser.parse_args()

requests = load_requests(args.requests) if args.requests else World().requests(args.n)
editor = Editor.from_pretrained(args.model, method="locft-bf", dtype=args.dtype)
result = editor.edit(requests)
print(f"{len(requests)} edits in {result.seconds:.1f} s: {'; '.join(result.notes)}")
print(editor.evaluate(requests))
result.save_model(args.output)

tokenizer = AutoTokenizer.from_pretrained(args.output)
model = AutoModelForCausalLM.from_pretrained(args.output)
for request in requests[:5]:
    inputs = tokenizer(request.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{request.prompt} →{answer.partition('.')[0]}   (wanted: {request.target})")
