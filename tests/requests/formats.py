"""A record of each published format with the request that it is, and what writes records to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastedit.requests import EditRequest

OWN = {"prompt": "The capital of Peru is", "target": "Oslo"}

FORMATS: dict[str, tuple[dict[str, Any], EditRequest]] = {
    "fastedit": (
        {
            "prompt": "The capital of Peru is ",
            "target": " Oslo",
            "subject": "Peru",
            "id": 7,
            "true_target": "Lima",
            "paraphrases": ["Peru's capital is"],
            "neighbours": [["The capital of Chile is", "Santiago"]],
            "portability": [["The mayor of Peru's capital is", "Anne"]],
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "7",
            "Lima",
            ("Peru's capital is",),
            (("The capital of Chile is", "Santiago"),),
            (("The mayor of Peru's capital is", "Anne"),),
        ),
    ),
    "CounterFact": (
        {
            "case_id": 34,
            "pararel_idx": 1,
            "requested_rewrite": {
                "prompt": "{} {was} employed in",
                "relation_id": "P937",
                "target_new": {"str": "Oslo", "id": "Q1"},
                "target_true": {"str": "Paris", "id": "Q2"},
                "subject": "Ada Roe",
            },
            "paraphrase_prompts": ["Rain fell. Ada Roe worked in", "Ada Roe took up work in"],
            "neighborhood_prompts": ["Max Poe worked in", "Eva Coe was employed in"],
            "attribute_prompts": ["Ole Doe worked in"],
            "generation_prompts": ["Ada Roe's office is in"],
            "portability": {
                "Recalled Relation": "r",
                "New Question": "Ada's city's river?",
                "New Answer": "Aker",
            },
        },
        EditRequest(
            "Ada Roe {was} employed in",
            "Oslo",
            "Ada Roe",
            "34",
            "Paris",
            ("Rain fell. Ada Roe worked in", "Ada Roe took up work in"),
            (("Max Poe worked in", "Paris"), ("Eva Coe was employed in", "Paris")),
            (("Ada's city's river?", "Aker"),),
        ),
    ),
    "CounterFact flat": (
        {
            "case_id": 0,
            "prompt": "The mother tongue of Ada Roe is",
            "target_new": "English",
            "subject": "Ada Roe",
            "ground_truth": "French",
            "rephrase_prompt": "Ada Roe speaks",
            "locality_prompt": "Max Poe speaks",
            "locality_ground_truth": "Dutch",
        },
        EditRequest(
            "The mother tongue of Ada Roe is",
            "English",
            "Ada Roe",
            "0",
            "French",
            ("Ada Roe speaks",),
            (("Max Poe speaks", "Dutch"),),
        ),
    ),
    "zsRE": (
        {
            "subject": "Cod Creek",
            "src": "Which river has Cod Creek?",
            "pred": "Ouse",
            "rephrase": "What river is Cod Creek in?",
            "alt": " Trent",
            "answers": ["Thames", "River Thames"],
            "loc": "nq question: how many books are there",
            "loc_ans": "12",
            "cond": "Ouse >> Trent || Which river has Cod Creek?",
        },
        EditRequest(
            "Which river has Cod Creek?",
            "Trent",
            "Cod Creek",
            "0",
            "Thames",
            ("What river is Cod Creek in?",),
            (("nq question: how many books are there", "12"),),
        ),
    ),
    "WikiBigEdit": (
        {
            "tag": "new",
            "subject": "Cod Kirk",
            "update": "Where is Cod Kirk?",
            "ans": "Fife",
            "rephrase": "In which county is Cod Kirk?",
            "personas": "Ahoy, where be Cod Kirk?",
            "mhop": "Who is lord lieutenant of Cod Kirk's county?",
            "mhop_ans": "Bo Ek",
            "loc": "Where is Eel Kirk?",
            "loc_ans": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            "Cod Kirk",
            "0",
            None,
            ("In which county is Cod Kirk?", "Ahoy, where be Cod Kirk?"),
            (("Where is Eel Kirk?", "Angus"),),
            (("Who is lord lieutenant of Cod Kirk's county?", "Bo Ek"),),
        ),
    ),
    "WikiBigEdit, LocFT's cut": (
        {
            "prompt": "Where is Cod Kirk?",
            "target_new": "Fife",
            "subject": "Cod Kirk",
            "rephrase_prompt": "In which county is Cod Kirk?",
            "locality_prompt": "Where is Eel Kirk?",
            "locality_ground_truth": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            "Cod Kirk",
            "0",
            None,
            ("In which county is Cod Kirk?",),
            (("Where is Eel Kirk?", "Angus"),),
        ),
    ),
    "QAEdit": (
        {
            "id": "qa-12",
            "source": "NQ",
            "prompt": "who sang Mud",
            "target": "Bo Ek",
            "subject": "Mud",
            "rephrase": "the singer of Mud",
            "locality": [{"loc": "who wrote Silt", "loc_ans": "Al Fe"}, {"loc": "no answer", "loc_ans": ""}],
        },
        EditRequest(
            "who sang Mud",
            "Bo Ek",
            "Mud",
            "qa-12",
            None,
            ("the singer of Mud",),
            (("who wrote Silt", "Al Fe"),),
        ),
    ),
    "KnowEdit": (
        {
            "subject": "Cod",
            "prompt": "Which family is Cod in?",
            "target_new": " Eels",
            "ground_truth": [["Gadidae", "cods"], ["codfish"]],
            "rephrase_prompt": "Cod's family?",
            "cond": "x",
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "The rank of Cod is", "ground_truth": [["species", "kind"]]},
                    {"prompt": "Cod lives in", "ground_truth": "water"},
                ],
                "Forgetfulness": {
                    "prompt": ["Cod eats", "Cod is"],
                    "ground_truth": ["crabs", ["grey", "green"]],
                },
            },
            "portability": {
                "Reasoning": [{"prompt": "The family of Cod is named after?", "ground_truth": "Eel"}],
                "Subject_Aliasing": [],
            },
        },
        EditRequest(
            "Which family is Cod in?",
            "Eels",
            "Cod",
            "0",
            "Gadidae",
            ("Cod's family?",),
            (
                ("The rank of Cod is", "species"),
                ("Cod lives in", "water"),
                ("Cod eats", "crabs"),
                ("Cod is", "grey"),
            ),
            (("The family of Cod is named after?", "Eel"),),
        ),
    ),
    "KnowEdit's WikiBio": (
        {
            "concept": "bo ek",
            "text": "A passage about bo ek. ",
            "labels": "Bo Ek sings.",
            "locality": {"Relation_Specificity": [{"prompt": "Bo Ek's sex is", "ground_truth": [["male"]]}]},
        },
        EditRequest("A passage about bo ek.", "Bo Ek sings.", "bo ek", "0", neighbours=(("Bo Ek's sex is", "male"),)),
    ),
    "UltraEditBench": (
        {
            "prompt": "Where is Cod Kirk?",
            "rephrase_prompt": "In which county is Cod Kirk?",
            "ans": "Fife",
            "loc": "Where is Eel Kirk?",
            "loc_ans": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            None,
            "0",
            None,
            ("In which county is Cod Kirk?",),
            (("Where is Eel Kirk?", "Angus"),),
        ),
    ),
    "UltraEdit's zsRE": (
        {
            "subject": "Cod Creek",
            "src": "Which river has Cod Creek?",
            "ans": "Trent",
            "rephrase": "What river is Cod Creek in?",
            "loc": "nq question: how many books are there",
            "loc_ans": "12",
        },
        EditRequest(
            "Which river has Cod Creek?",
            "Trent",
            "Cod Creek",
            "0",
            None,
            ("What river is Cod Creek in?",),
            (("nq question: how many books are there", "12"),),
        ),
    ),
    "FEVER": (
        {
            "prompt": "Cod Kirk is in Fife.",
            "pred": "SUPPORTS",
            "alt": "REFUTES",
            "equiv_prompt": ["Fife has Cod Kirk.", "Cod Kirk stands in Fife."],
            "unrel_prompt": "Eel Kirk is in Angus.",
            "unrel_ans": "SUPPORTS",
        },
        EditRequest(
            "Cod Kirk is in Fife.",
            "REFUTES",
            None,
            "0",
            None,
            ("Fife has Cod Kirk.", "Cod Kirk stands in Fife."),
            (("Eel Kirk is in Angus.", "SUPPORTS"),),
        ),
    ),
    "UnKE": (
        {
            "id": 3,
            "question": "Who was Bo Ek?",
            "answer": "Bo Ek sang. She wrote songs in Fife.",
            "para_question": "What is known of Bo Ek?",
            "sub_question": ["Where did Bo Ek write?", "What did Bo Ek do?"],
            "sub_answer": ["in Fife", "sing"],
        },
        EditRequest(
            "Who was Bo Ek?",
            "Bo Ek sang. She wrote songs in Fife.",
            None,
            "3",
            None,
            ("What is known of Bo Ek?",),
            (),
            (("Where did Bo Ek write?", "in Fife"), ("What did Bo Ek do?", "sing")),
        ),
    ),
    "AKEW's CounterFact": (
        {
            "case_id": 5,
            "requested_rewrite": {
                "prompt": "{} was employed in",
                "prompt_full": "Ada Roe was employed in",
                "relation_id": "P937",
                "target_new": {"str": "Oslo", "id": "Q1"},
                "target_true": {"str": "Paris", "id": "Q2"},
                "subject": "Ada Roe",
                "question": "Where was Ada Roe employed?",
                "fact_new_uns": "Ada Roe, who worked in Oslo all her life, …",
                "unsfact_triplets_GPT": [{"subject": "Ada Roe", "prompt": "{} worked in", "target": "Oslo"}],
            },
            "paraphrase_prompts": ["Ada Roe took up work in"],
        },
        EditRequest(
            "Ada Roe was employed in",
            "Oslo",
            "Ada Roe",
            "5",
            "Paris",
            ("Ada Roe took up work in", "Where was Ada Roe employed?"),
        ),
    ),
    "EasyEdit's arguments": (
        {
            "prompt": "The capital of Peru is",
            "target_new": "Oslo",
            "subject": "Peru",
            "target_old": "Lima",
            "rephrase_prompts": ["Peru's capital is", "The capital of {subject} is called"],
            "locality_inputs": {"neighborhood": {"prompt": ["Chile's capital is"], "ground_truth": ["Santiago"]}},
            "portability_inputs": {"one_hop": {"prompt": "The mayor of {}'s capital is", "ground_truth": "Anne"}},
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "0",
            "Lima",
            ("Peru's capital is", "The capital of Peru is called"),
            (("Chile's capital is", "Santiago"),),
            (("The mayor of Peru's capital is", "Anne"),),
        ),
    ),
    "single questions": (
        {
            "prompt": "The capital of [X] is",
            "target_new": "Oslo",
            "subject": "Peru",
            "locality_prompt": "[X] lies in",
            "locality_answer": "America",
            "portability_prompt": ["The mayor of Peru's capital is", "{subject}'s capital lies at"],
            "portability_answer": ["Anne", "a fjord"],
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "0",
            neighbours=(("Peru lies in", "America"),),
            portability=(("The mayor of Peru's capital is", "Anne"), ("Peru's capital lies at", "a fjord")),
        ),
    ),
}


def mquake_rewrite(subject: str, new: str, old: str) -> dict[str, Any]:
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
        "fact_new_uns": "…",  # AKEW's
    }


def write(path: Path, records: list[Any], lines: bool = False) -> Path:
    dumped = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    path.write_text(dumped, encoding="utf-8")
    return path
