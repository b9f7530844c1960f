"""Blame: the facts whose keys are near."""

from __future__ import annotations

import pytest
from ledgers import EDITS, A, B, C, Open

from fastedit import EditRequest, RequestError


@pytest.mark.parametrize("way", ["memit", "locft-bf"])
def test_blame_names_the_facts_with_near_keys(way: str, opened: Open) -> None:
    with opened(way=way) as ledger:
        ledger.add(EDITS)
        found = ledger.blame(B.prompt)
        assert len(found) == 4
        assert (found[0].fact.id, found[0].at) == ("B", B.subject)
        assert found[0].cosine == pytest.approx(1, abs=1e-5)
        assert found[1].cosine < 0.99
        assert ledger.blame(f"w80 {C.subject} w81")[0].at == C.subject
        (first, *_) = ledger.blame("w80 w81 w82", subject="w81")
        assert first.at == "w81"
        with pytest.raises(RequestError, match="the prompt"):
            ledger.blame("w80 w81", subject="w9")


def test_blame_reads_a_fact_without_its_subject_at_the_end(opened: Open) -> None:
    with opened(way="locft-bf") as ledger:
        ledger.add([A, EditRequest("w80 w81", "w9", "w7", id="aside"), EditRequest("w82 w83", "w9", id="bare")])
        assert [ledger.blame(prompt)[0].fact.id for prompt in ("w80 w81", "w82 w83")] == ["aside", "bare"]
