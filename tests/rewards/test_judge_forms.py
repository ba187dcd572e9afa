"""What a judge gives: claims read strictly, what they come to by hand, and through a server."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rewards.judge_client import JudgeError
from rewards.judge_forms import CLAIMS, FORMS, MOST, SCORE
from tests.support.judge_server import HOSTILE, Reply, Server, make, run, says, seen

pytestmark = pytest.mark.usefixtures("no_waiting")


def claims(supported: Any = (), made_up: Any = (), missed: Any = ()) -> dict[str, Any]:
    listed = [{"claim": c, "supported": True} for c in supported]
    listed += [{"claim": c, "supported": False} for c in made_up]
    return {"claims": listed, "missed": list(missed)}


def test_numbers_are_precision_recall_and_their_harmonic_mean() -> None:
    for s, u, m in itertools.product(range(5), repeat=3):
        found = CLAIMS.numbers([s, u, m])
        precision = s / (s + u) if s + u else 0.0
        recall = s / (s + m) if s + m else 0.0
        both = precision + recall
        assert found == {
            "value": pytest.approx(2 * precision * recall / both if both else 0.0),
            "supported": pytest.approx(precision),
            "missed": pytest.approx(1 - recall),
        }
    # Saying less raises one number and lowers the other; made-up claims the other way round.
    all_, one, more = (CLAIMS.numbers(v) for v in ([4, 2, 1], [1, 0, 4], [4, 6, 1]))
    assert one["supported"] > all_["supported"] > more["supported"]
    assert one["missed"] > all_["missed"] == more["missed"]
    assert all_["value"] > max(one["value"], more["value"])
    assert CLAIMS.numbers(None) == {"value": 0.0, "supported": 0.0, "missed": 1.0}
    assert SCORE.numbers(7) == {"value": 0.7} and SCORE.numbers(None) == {"value": 0.0}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (claims(), [0, 0, 0]),
        (claims(["a"], ["b", "c"], ["d"]), [1, 2, 1]),
        # Said twice counts once, whatever the case and the spaces; said both ways it is made up.
        (claims(["a dot", " A  Dot "], ["b"], ["c", "C"]), [1, 1, 1]),
        (claims(["a"], ["A"]), [0, 1, 0]),
        ({**claims(), "claims": claims(["a"], ["a"])["claims"][::-1]}, [0, 1, 0]),
        ({"claims": []}, None),
        ({"claims": [], "missed": [], "score": 10}, None),
        ({"claims": {}, "missed": []}, None),
        ({"claims": [], "missed": ["x", 3]}, None),
        ({"claims": [], "missed": [" "]}, None),
        ({"claims": ["a"], "missed": []}, None),
        ({"claims": [{"claim": "a", "supported": 1}], "missed": []}, None),
        ({"claims": [{"claim": "a", "supported": "true"}], "missed": []}, None),
        ({"claims": [{"claim": "", "supported": True}], "missed": []}, None),
        ({"claims": [{"claim": None, "supported": True}], "missed": []}, None),
        ({"claims": [{"claim": "a", "supported": True, "why": "x"}], "missed": []}, None),
        ({"score": 10}, None),
        ([], None),
        (None, None),
    ],
)
def test_claims_are_read_strictly(value: Any, verdict: list[int] | None) -> None:
    assert CLAIMS.read(value) == verdict
    assert verdict is None or CLAIMS.in_range(verdict)


def test_verdicts_out_of_range() -> None:
    for wrong in ([1, 2], [1, 2, -1], [1.0, 2, 3], [True, 0, 0], [MOST, 1, 0], [0, 0, MOST + 1], 3):
        assert not CLAIMS.in_range(wrong)
    for form in FORMS.values():
        assert not form.in_range(None) and not form.in_range("10")


def test_claims_through_a_server(server: Server, tmp_path: Path) -> None:
    replies = {
        "two dots": claims(["there are two dots"], ["they are red"], ["a line"]),
        "nothing": claims(missed=["two dots"]),
    }

    def reply(n: int, body: dict[str, Any]) -> Reply:
        said = json.loads(body["messages"][-1]["content"].split("\n")[1])
        return Reply(200, says(json.dumps(replies.get(said, claims()))))

    server.reply = reply
    one = seen("two dots", None, "nothing", *HOSTILE[:2], "two dots")
    judge = make(server.url, mode="claims", cache=str(tmp_path))
    (found,) = run(judge, one)
    assert found == {
        "value": [0.5, 0, 0, 0, 0, 0.5],
        "supported": [0.5, 0, 0, 0, 0, 0.5],
        "missed": [0.5, 1, 1, 1, 1, 0.5],
    }
    assert len(server.bodies) == 4 and judge.counts()["unreadable"] == 1
    assert run(make(server.url, mode="claims", cache=str(tmp_path)), one) == [found]
    assert len(server.bodies) == 4
    body = server.bodies[0]
    schema = body["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]) == {"claims", "missed"} and body["max_tokens"] == 1024
    rules = body["messages"][0]["content"]
    assert rules.startswith(CLAIMS.rubric) and rules.endswith(CLAIMS.reply)
    # A score is no verdict on claims, in a cache entry either.
    for entry in tmp_path.glob("*.json"):
        entry.write_text(json.dumps({"key": entry.stem, "score": 7}))
    again = make(server.url, mode="claims", cache=str(tmp_path))
    with pytest.warns(UserWarning, match="damaged"):
        assert run(again, one) == [found]
    assert again.counts()["cache_corrupt"] == 4


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"score": 10}', "malformed"),
        ('{"claims": [{"claim": "a", "supported": tru', "malformed"),
        (json.dumps(claims(["a"])) + " done", "malformed"),
        ('{"claims": [], "missed": [], "missed": []}', "malformed"),
        (json.dumps(claims(map(str, range(MOST + 1)))), "out_of_range"),
        ("[" * 50_000, "malformed"),
        ("", "empty_reply"),
    ],
)
def test_a_reply_that_lists_no_claims_is_never_a_zero(
    server: Server, content: str, kind: str
) -> None:
    server.script(Reply(200, says(content)))
    judge = make(server.url, mode="claims", structured=False)
    with pytest.raises(JudgeError) as caught:
        run(judge, seen("a"))
    assert caught.value.kind == kind
    assert judge.counts()[f"failures/{kind}"] == judge.counts()["given_up"] == 1


def test_claims_cannot_be_spelled_out() -> None:
    with pytest.raises(ValueError, match=r"mode: .*structured"):
        make("http://localhost/v1", mode="claims", structured="choice")
