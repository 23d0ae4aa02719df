"""How often people are asked, as `cgrpo estimate` and `cgrpo doctor` say it."""

from dataclasses import replace

from helpers import changed

from customized_grpo.config import RunConfig
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.tools.doctor.run import votes
from customized_grpo.tools.estimate.votes import count_votes


def test_each_group_is_asked_about_once_for_everybody_needed(tiny_config: RunConfig) -> None:
    assert count_votes(tiny_config) == ()
    assert list(votes(tiny_config)) == []
    config = replace(tiny_config, rewards=(VotesConfig(objective="prompt", min_votes=3),))
    config = changed(config, train={"num_updates": 400, "inner_updates": 2})
    (count,) = count_votes(config)
    assert (count.per_rollout, count.votes, count.group_size) == (2 * 3, 2 * 3 * 200, 3)
    (finding,) = votes(config)
    assert finding.status == "ok"
    assert finding.found == (
        "votes: 6 votes of people for each rollout, each on 3 pictures; 1,200 in all, "
        "3.3 h at 10 s each (assumed)"
    )
    for fields in ({"prompts_per_rollout": 12}, {"group_size": 10}):
        (finding,) = votes(changed(config, rollout=fields))
        assert finding.status == "warning"
        assert "lower rollout.prompts_per_rollout and group_size" in finding.fix
