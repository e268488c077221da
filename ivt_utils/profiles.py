"""Every value of every experiment: the profiles `smoke`, `micro`, `colab`, `paper`, and the micro student's recipe."""

import json
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class StudentRecipe:
    """How the shipped micro student is built and trained from scratch (our choice; the paper starts from Qwen3-VL)."""

    image_side: int = 96  # pixels, after the processor's resize
    patch: int = 8
    text_width: int = 128
    text_layers: int = 5
    vision_width: int = 64
    vision_layers: int = 3
    steps: int = 9_250  # stopped early on purpose: later, hardly an error is left to correct
    vision_steps: int = 4_000  # the first steps train the vision tower alone, on what each image token shows
    vision_lr: float = 2e-3  # in those steps
    batch_size: int = 8  # small batches: learning is limited by steps, not by scenes
    lr: float = 1e-3
    betas: tuple = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    decay_from: int = 9_000  # the learning rate is constant up to this step,
    decay_steps: int = 1_600  # then falls in a line, over so many steps,
    floor: float = 0.05  # to this share
    # the guides of training (pretrain.py): their weights, and where in the text model they stand
    cell_weight: float = 0.3
    word_weight: float = 0.5
    point_weight: float = 2.0
    words_after: int = 2  # layers, until the answer holds the words of its expression
    points_in: int = 3  # the layer, from 0, whose first head looks at the referent
    window: int = 50  # steps a curriculum decision looks back
    learnt_below: float = 2.6  # nats a coordinate: below it, the scenes get one thing more
    plain_below: int = 6  # with fewer things than this, expressions are color and shape alone
    first_things: int = 3  # the scenes at first, and
    things: int = 8  # the hardest ones
    # (images, questions on each): the kinds of batch, and how often each is drawn
    chats: tuple = ((1, 3), (2, 1), (2, 2), (3, 1))
    chat_weights: tuple = (0.5, 0.25, 0.1, 0.15)
    again_share: float = 0.3  # how often an answer is asked for again, without an image: the same box
    another_share: float = 0.6  # how often a further image comes with the same expression, in other words
    phrases: int = 3  # of `protocol.ANOTHER` in such a turn, at most; many turns, so that an unknown one is nothing new
    # what copying needs
    smooth_scale: float = 0.1  # of a number's smooth code (length: times 8), and
    own_scale: float = 0.07  # of its own direction (times 11), at first
    branch_scale: float = 0.25  # of the outputs of the text model's layers, at first
    copy_head: int = 1  # of the layer `points_in`: looks, in a repeated answer, at the answer before
    copy_scale: float = 1.0  # of what it then says, at first
    copy_weight: float = 1.0


STUDENT_RECIPE = StudentRecipe()

# The geometric teacher's, in every profile:
TEACHER_TOLERANCE = 0.1  # of the truth's width or height: a smaller error is named only where it is the largest one
MOST_PROBLEMS = 2  # named in one trace


@dataclass(frozen=True)
class Profile:
    """The values of one size of the experiment. What the paper does not give is our choice; see docs/results.md."""

    name: str
    student: str  # a folder of the project, or a name on the Hub
    data: str  # "synthetic" (shipped) or "hub" (`ivt data` prepares it)
    train: int  # samples of each split
    val: int
    test: int
    grid: int = 10  # the step of the student's coordinates 0..1000
    student_revision: str = ""  # of a student of the Hub: the commit hash there
    load_in_4bit: bool = False  # NF4, for a student of the Hub; `lm_head` never
    eyes_in_16bit: bool = False  # its vision tower is left out of that
    engine: str = "local"  # what answers: this code, or "served: NAME", a model behind an API (`ivt eval --base-url`)
    max_pixels: int = 0  # of an image after the processor's resize; 0: as the processor comes
    data_seed: int = 0  # which samples of the Hub's sets are drawn, and into which split
    # closed loop
    turns: int = 2  # T: refinements after step 0 (paper)
    long_turns: int = 5  # T of a longer loop, in which a student that cannot keep a box drifts; at most `turns`: none
    style: str = "filled"  # how the box is drawn: filled (filled:120 is more opaque, of 255), outline, none
    max_new_tokens: int = 32  # of one answer
    batch_size: int = 64  # samples generated at once
    # A first look at a student of the Hub stops below this mean IoU. Another sample's box has 0.04 by chance on the
    # shipped benchmark; coordinates of another scale or order, or blind eyes, come near it.
    least_first_iou: float = 0.05
    # harvest: own step-0 predictions with an IoU in [0, this] become trajectories (paper)
    harvest_max_iou: float = 0.85
    trace: bool = True  # the teacher's short reason before each corrected box
    # a VLM as teacher (`ivt teach`), over an OpenAI-compatible API
    teacher_tokens: int = 60  # of one reason, at most
    teacher_tries: int = 3  # answers asked for one reason before the geometric teacher gives it
    teacher_temperature: float = 0.7
    teacher_workers: int = 8  # requests under way at once
    teacher_timeout: float = 120.0  # seconds for one answer
    # a served student (`ivt eval --base-url`): chats it is asked at once, in place of `batch_size`
    student_workers: int = 64
    student_timeout: float = 120.0  # seconds for one answer
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    # SFT
    sft_epochs: float = 1.5
    sft_lr: float = 1.5e-3
    sft_schedule: str = "cosine"  # of the learning rate, one that transformers knows, after
    sft_warmup: float = 0.05  # this share of the steps
    sft_batch: int = 4  # small batches here, too
    sft_device_batch: int = 0  # trajectories a device holds at once, the rest by accumulation; 0: all of its share
    # GRPO: the group size, the bonus and beta are the paper's
    grpo_turns: int = 5  # refinements in a rollout: in the longer loop the micro student has something to lose
    grpo_steps: int = 20  # of a run of the course; the reference is trained longer, with `ivt grpo --steps`
    grpo_prompts: int = 4  # prompts a step, each with `generations` rollouts
    generations: int = 6
    grpo_device_batch: int = 0  # rollouts a device learns from at once; 0: all of its share
    grpo_generated: int = 0  # rollouts a device generates at once; 0: all of its share
    # for a student of the Hub, `ivt eval` and the like set both to what the card holds, but not above
    most_at_once: int = 64
    grpo_lr: float = 4e-4
    grpo_schedule: str = "constant_with_warmup"
    grpo_warmup: float = 0.05
    grpo_loss: str = "grpo"  # how tokens are averaged, as TRL's `loss_type`
    feedback_tokens: int = 64  # room for the words of a feedback in a rollout; too little of it stops the training
    grpo_probe: int = 128  # validation prompts that are answered greedily, for the learning curve,
    probe_every: int = 25  # every so many steps, and before the first and after the last
    beta: float = 0.04  # KL to the SFT policy
    format_bonus: float = 0.1
    temperature: float = 0.7  # at 1 the micro student, unsure of its digits, ends a long loop nowhere
    scale_rewards: str = "batch"  # advantages are divided by the spread of all generated together, or of the "group"
    ablation_test: int = 255  # the first samples of the validation split, on which ablations are scored
    # the mirage: by which shares of its size a shown box is moved, and among which thresholds a stopping rule chooses
    control_shifts: tuple = (0.1, 0.25, 0.5)
    thresholds: tuple = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    # a closer look (closer.py): another loop and recipe, of our own; chosen for micro, untried elsewhere
    looks: int = 1  # closer looks after the first answer
    zoom: float = 4.0  # the side of what is looked at, in longer sides of the box,
    least_view: int = 200  # and this at least (0..1000), for a small box would be shown as a handful of pixels
    closer_steps: int = 600  # optimizer steps, with the learning rate and batch of SFT
    # intervals
    resamples: int = 2000
    save_every: int = 20  # optimizer steps between checkpoints

    @property
    def hub_student(self) -> bool:
        """Return whether the student is one of the Hub's ("owner/name"), not the micro student in a folder."""
        return not self.student.startswith(("data/", "/"))

    def recipe(self) -> dict:
        """Return the values that make a run what it is, in the types of JSON: all but those of `COST_ONLY`."""
        values = {name: value for name, value in asdict(self).items() if name not in COST_ONLY}
        return json.loads(json.dumps(values))

    def changed(self, noted: dict) -> list[str]:
        """Return the names of the values that differ from those that a run has noted as its recipe.

        A value that the note lacks came later; until then the code had what is now its default.
        """
        before = Profile(self.name, self.student, self.data, self.train, self.val, self.test).recipe() | noted
        return sorted(name for name, value in self.recipe().items() if before[name] != value)


# What a run costs, and how it fits a machine: these values may be changed in the middle of a run.
# In 16 bits the size of a batch can change a text all the same, so each stage notes its own.
# The teacher's are noted in each trajectory.
COST_ONLY = (
    "batch_size",
    "least_first_iou",
    "sft_device_batch",
    "grpo_device_batch",
    "grpo_generated",
    "most_at_once",
    "feedback_tokens",
    "teacher_workers",
    "teacher_timeout",
    "student_workers",
    "student_timeout",
    "teacher_tokens",
    "teacher_tries",
    "teacher_temperature",
)
DRY_RUN = "-dry-run"  # "paper-dry-run": the paper's settings, walked through with a few made-up samples

_MICRO = Profile(name="micro", student="data/student", data="synthetic", train=2400, val=510, test=505)
_PAPER = Profile(
    name="paper",
    student="Qwen/Qwen3-VL-4B-Instruct",
    student_revision="ebb281ec70b05090aa6165b016eac8ec08e71b17",
    data="hub",
    train=2400,
    val=510,
    test=505,
    grid=1,
    long_turns=2,
    grpo_turns=2,
    load_in_4bit=True,
    eyes_in_16bit=True,
    max_pixels=512 * 32 * 32,
    max_new_tokens=128,
    batch_size=8,
    sft_device_batch=2,
    grpo_device_batch=6,
    grpo_generated=6,
    lora_rank=64,
    lora_alpha=128,
    sft_epochs=2,
    sft_lr=1e-4,
    sft_batch=16,
    grpo_steps=300,
    grpo_prompts=4,
    grpo_lr=1e-5,
    temperature=1.0,
    scale_rewards="group",
    ablation_test=510,
)
PROFILES = {
    "smoke": replace(
        _MICRO,
        name="smoke",
        train=32,
        val=16,
        test=16,
        batch_size=8,
        sft_epochs=1,
        grpo_steps=1,
        grpo_prompts=2,
        long_turns=3,
        grpo_turns=3,
        grpo_probe=8,
        probe_every=1,
        closer_steps=1,
        ablation_test=8,
        resamples=200,
        save_every=1,
    ),
    "micro": _MICRO,
    "colab": replace(
        _PAPER,
        name="colab",
        student="Qwen/Qwen3-VL-2B-Instruct",
        student_revision="89644892e4d85e24eaac8bacfd4f463576704203",
        train=600,
        val=128,
        test=128,
        max_pixels=384 * 32 * 32,
        sft_device_batch=1,
        grpo_device_batch=2,
        grpo_steps=100,
        grpo_prompts=2,
        ablation_test=128,
    ),
    "paper": _PAPER,
}


def get_profile(name: str) -> Profile:
    """Return a profile by name; an unknown name raises a ValueError that lists the names.

    "paper-dry-run" and "colab-dry-run" are those profiles with the micro student, 8 samples a split and a step or two
    of each training: a walk through every stage, on data that looks like the Hub's.
    """
    if isinstance(name, str) and name.endswith(DRY_RUN):
        real = get_profile(name.removesuffix(DRY_RUN))
        if real.data != "hub":
            raise ValueError(f"A dry run is for the profiles colab and paper; {real.name} runs as it is.")
        return replace(
            real,
            name=name,
            student=_MICRO.student,
            student_revision=_MICRO.student_revision,
            grid=_MICRO.grid,
            max_pixels=_MICRO.max_pixels,
            train=8,
            val=8,
            test=8,
            sft_epochs=1,
            grpo_steps=1,
            resamples=200,
            save_every=1,
        )
    if name not in PROFILES:
        raise ValueError(f"There is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]


def grpo_trial(profile: Profile) -> Profile:
    """Return the profile with a training of GRPO that takes seconds on a core, for a look at a reader's own reward.

    Its loop is the paper's, its steps are few and small, and none of them is spent on a warm-up; all else stays.
    """
    return replace(
        profile,
        grpo_turns=profile.turns,
        grpo_steps=min(3, profile.grpo_steps),
        grpo_prompts=2,
        grpo_warmup=0.0,
        grpo_probe=min(32, profile.grpo_probe),
    )
