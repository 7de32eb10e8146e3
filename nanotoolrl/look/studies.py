"""The studies of `python -m nanotoolrl.study`: a name, its runs, and the flags of each for train.py."""

SEEDS = range(5)
FEWER = range(3)  # where many settings are looked at
TWO = range(2)  # of a candidate

# The search for `--preset collapse`.
SCREEN = "--scheme grpo --eval-count 100 --eval-part 100"  # a look, not a claim: these are tasks of `test`
SMALL = "--prompts 4 --probe-every 4"
WHOLE = "--eval-count 400 --eval-part 400 --eval-every 33"
COLLAPSE_SEARCH = {
    "lr4e-4": "--steps 40 --lr 4e-4",
    "lr8e-4": "--steps 80 --lr 8e-4 --warmup 20",
    "lr1e-3": "--steps 40 --lr 1e-3 --warmup 20",
    "ramp2e-3": "--steps 40 --lr 2e-3 --warmup 40",
    "ramp3e-3": "--steps 36 --lr 3e-3 --warmup 36",
    "updates4-lr4e-4": "--steps 25 --lr 4e-4 --updates 4",
    "updates4-lr8e-4": "--steps 20 --lr 8e-4 --updates 4",
    "updates16-lr2e-4": "--steps 20 --lr 2e-4 --updates 16",
    "hard-updates4-lr4e-4": "--steps 30 --lr 4e-4 --updates 4 --min-turns 3",
    "prompts8-lr6e-4": "--steps 80 --lr 6e-4 --warmup 20 --prompts 8 --eval-every 20",
    "small-batch-lr4e-4": f"--steps 160 --lr 4e-4 --warmup 20 {SMALL} --eval-every 20",
    "small-batch-lr8e-4": f"--steps 120 --lr 8e-4 --warmup 20 {SMALL} --eval-every 30",
    "small-batch-lr1e-3": f"--steps 100 --lr 1e-3 --warmup 60 {SMALL} --eval-every 20",
    "small-batch-lr1e-3-warmup30": f"--steps 100 --lr 1e-3 --warmup 30 {SMALL} {WHOLE}",
    "small-batch-lr1e-3-warmup30-seed1": f"--steps 100 --lr 1e-3 --warmup 30 {SMALL} {WHOLE} --seed 1",
    "small-batch-ramp": f"--steps 110 --lr 1.6e-3 --warmup 110 {SMALL} --eval-every 20",
}


def arms(settings: dict[str, str], seeds: range = SEEDS) -> dict[str, str]:
    """A run of every arm for every seed, seed by seed: a study that was cut short has whole seeds."""
    return {
        f"{arm}-seed{seed}": f"{flags} --seed {seed}" for seed in seeds for arm, flags in settings.items()
    }


SPIKE = "--scheme grpo --preset spike"
ROUNDTRIP = "--scheme grpo --preset roundtrip"
REGIME = f"{ROUNDTRIP} --min-turns 4 --updates 3 --lr 1e-4 --steps 150"
EXACT = f"{SPIKE} --guard 0"  # plain GRPO, exactly on policy
# The rescue: every method in the setting that collapses, 128 rollouts a step, in rounds of four. Ground truth
# takes the place of one in eight in `ops`; `sft` makes none.
RESCUE = "--preset rescue"
EPOCHS = "--steps 57"  # three over the training tasks, as before the RL of `sft_rl`
METHODS = {
    "sft": f"--scheme sft {EPOCHS}",
    "sft-foreign": f"--scheme sft --sft-source foreign {EPOCHS}",
    "grpo": "--scheme grpo",
    "sft_rl": "--scheme sft_rl",
    "sft_rl-foreign": "--scheme sft_rl --sft-source foreign",
    "ops": "--scheme ops",
    "hint": "--scheme hint",
    "ets": "--scheme ets",
    "prs": "--scheme prs",
    "bursts": "--scheme bursts",
    "restart": "--scheme restart",
    "exact": "--scheme grpo --guard 0",  # what there would be to lose, were it not for the guard
}
# The other studies take half the rollouts a step: the fall comes a few steps later, in half the time.
HALF = f"{RESCUE} --prompts 8"
REFERENCES = {name: METHODS[name] for name in ("exact", "grpo", "ets", "prs")}
# A signal in every update instead of in bursts: each example once, at most sft_batch of them an update.
SYNC = "--schedule sync --sft-window 1"
SCHEDULE = {
    "ets-sync": f"--scheme ets {SYNC}",
    "prs-sync": f"--scheme prs {SYNC}",
    "sft-sync": f"--scheme sft {SYNC} --sft-batch 8",
    "sft-interleaved": "--scheme sft --schedule interleaved",
}
# Rates over two orders; the middle one, 2e-4, is in `both`, as all of these references are.
RATES = ("2e-5", "6e-5", "6e-4", "2e-3")
LR = {f"{name}-lr{rate}": f"--scheme {name} --lr {rate}" for name in ("grpo", "ets") for rate in RATES}
LR |= {f"ets-sft{rate}": f"--scheme ets --sft-lr {rate}" for rate in RATES}
ABLATE = {
    "psr": "--scheme psr",
    "nsr": "--scheme nsr",
    "guard0.3": "--scheme guard --guard 0.3",
    "guard0.5": "--scheme guard --guard 0.5",
    "gtpo": "--scheme grpo --gtpo 1",
    "prefix": "--scheme grpo --spare-passed 1",
    "rare": "--scheme grpo --rare 0.3",
    "silence": "--scheme grpo --silence 0.01",
    "void": "--scheme void",
    "llds": "--scheme llds",
    "filter": "--scheme grpo --filter 0.5",
    "mask-overlong": "--scheme grpo --mask-overlong",
    **{f"kl{kl}": f"--scheme grpo --kl {kl}" for kl in ("1e-4", "1e-3", "1e-2", "1e-1")},
    "updates3": "--scheme grpo --updates 3",
    "sequence-mean": "--scheme grpo --loss-agg sequence",
    "no-std": "--scheme grpo --no-adv-std",
    "graded": "--scheme grpo --graded-reward",
    # These differ from grpo where the ratio is not 1: beside updates3.
    "cispo": "--scheme grpo --loss cispo --updates 3",
    "gspo": "--scheme grpo --loss gspo --updates 3 --clip 3e-4 --clip-high 4e-4 --loss-agg sequence",
    "selfdistil": "--scheme selfdistil",
    "hpt": "--scheme hpt",
    "ghpo": "--scheme ghpo",
    "chord": "--scheme chord",
    "sentinel": "--scheme sentinel --probe-every 1",
    "ctrl_sft": "--scheme ctrl_sft",
    "selfrepair": "--scheme selfrepair",
}
# Success as with ets or prs, and no loss out of distribution: candidates, each of which is reported,
# and those that were promising after two seeds.
CANDIDATES = {
    # One step after a burst instead of four: what a round takes away again.
    "ets-after": "--scheme ets --steps 25",
    "prs-after": "--scheme prs --steps 25",
    "ets-rounds2": "--scheme ets --round-steps 2 --sft-window 2",
    "ets-tokens": "--scheme ets --sft-tokens 12000",
    "ets-formats": "--scheme ets --sft-tokens 12000 --ets-formats all",
    "prs-formats": "--scheme prs --ets-formats all",
}
PROMISING = {
    "ets-held": "--scheme ets --sft-tokens 12000 --ets-formats all --guard-kl 1",
    "guard-kl": "--scheme guard-kl",
}
# For a lesson: as short as shows it, one seed, two runs side by side. Not a claim.
DEMO = f"{RESCUE} --steps 16 --eval-count 50"
STUDIES = {
    "demo": {"collapse": f"--scheme grpo {DEMO}", "rescue": f"--scheme ets {DEMO}"},
    "collapse-search": {name: f"{SCREEN} {flags}" for name, flags in COLLAPSE_SEARCH.items()},
    "collapse": {
        f"seed{seed}": f"--scheme grpo --preset collapse --seed {seed} --eval-count 400 --eval-part 400 "
        "--eval-every 40"
        for seed in SEEDS
    },
    # How much of the push-down is spared: the dose.
    "dose": arms({f"guard{dose}": f"{SPIKE} --guard {dose}" for dose in (0, 0.25, 0.5, 0.75, 1)}),
    # Which tokens are spared.
    "spared": arms(
        {name: f"{SPIKE} --guard-tokens {name}" for name in ("structure", "paper", "opener", "stop")}
    ),
    # Tokens that are trained as their text, beside the twin that trains what was sampled.
    "roundtrip": arms({how: f"{ROUNDTRIP} --record {how}" for how in ("text", "exact")}),
    "roundtrip-parts": arms({how: f"{ROUNDTRIP} --record {how}" for how in ("encode", "stop", "vanish")}),
    "main": arms({name: f"{flags} {RESCUE}" for name, flags in METHODS.items()}),
    "schedule": arms({name: f"{flags} {HALF}" for name, flags in SCHEDULE.items()}),
    "lr": arms({name: f"{flags} {HALF}" for name, flags in LR.items()}, FEWER),
    "both": arms({name: f"{flags} {HALF}" for name, flags in (REFERENCES | PROMISING).items()})
    | arms({name: f"{flags} {HALF}" for name, flags in CANDIDATES.items()}, TWO),
    "ablate": arms({name: f"{flags} {HALF}" for name, flags in ABLATE.items()}, FEWER),
    # Every method again, from a base of another seed.
    "other-base": arms({name: f"{flags} {HALF} --model data/nano-s1" for name, flags in METHODS.items()}),
    # The paper's regime: few successes, many small updates.
    "regime": arms({how: f"{REGIME} --record {how}" for how in ("exact", "text")}),
    # Other ways to train what the policy did not sample, or not so.
    "mismatch": arms(
        {
            "top-p": f"{EXACT} --top-p 0.9",
            "min-p": f"{EXACT} --min-p 0.05",
            "bf16": f"{EXACT} --sampler-dtype bf16",
            "updates4": f"{EXACT} --updates 4",
            "updates16": f"{EXACT} --updates 16",
            "ops": "--scheme ops --preset spike --guard 0",
            "hint": "--scheme hint --preset spike --guard 0",
        }
    ),
}
