"""What ORCA's and PaRe's authors trained each task with (their released settings): --paper.

ORCA[task] and PARE[task] are dicts of the fields of a script's Config. careful: the released code
adds up the gradients of accumulated batches where we average them. So lr is its own times
`accumulate` (SGD), weight_decay its own over `accumulate` (SGD, Adam), clip its own over
`accumulate`.
"""

from tasks import PDES

COLUMNS = ("optimizer", "lr", "weight_decay", "batch_size", "accumulate", "epochs")
COLUMNS += ("warmup", "schedule_epochs", "clip", "align_lr")  # warmup: of schedule_epochs
ROWS = {
    "cifar100": ("sgd", 3.2e-3, 1e-3 / 32, 1024, 32, 60, 5 / 200, 200, 0.0, 1e-3),
    "spherical": ("adamw", 1e-4, 0.1, 128, 4, 60, 5 / 60, 60, 0.0, 1e-3),
    "darcy": ("adamw", 1e-3, 5e-3, 4, 1, 100, 5 / 100, 100, 0.0, 1e-2),
    "psicov": ("adam", 5e-6, 1e-5 / 32, 32, 32, 10, 5 / 100, 100, 0.0, 5e-5),
    "cosmic": ("adamw", 1e-3, 0.0, 4, 1, 60, 5 / 60, 60, 0.0, 1e-2),
    "ninapro": ("adam", 1e-4, 1e-5, 32, 1, 60, 5 / 60, 60, 1.0, 1e-3),
    "fsd50k": ("adam", 1e-4, 5e-5, 32, 1, 100, 5 / 100, 100, 0.0, 1e-3),
    "ecg": ("sgd", 1.6e-5, 0.1 / 16, 64, 16, 15, 5 / 200, 200, 0.0, 1e-5),
    "satellite": ("adamw", 3e-5, 3e-6, 64, 4, 60, 5 / 60, 60, 0.0, 3e-4),
    "deepsea": ("adam", 1e-5, 0.0, 16, 1, 13, 10 / 25, 25, 1.0, 1e-4),
    "advection": ("adam", 1e-4, 1e-5, 4, 1, 200, 5 / 200, 200, 1.0, 1e-3),
    "burgers": ("adam", 1e-5, 1e-5, 4, 1, 200, 5 / 200, 200, 1.0, 1e-4),
    "diffusion_reaction_1d": ("sgd", 1e-3, 1e-5, 4, 1, 200, 5 / 200, 200, 1.0, 1e-2),
    "diffusion_sorption": ("adamw", 1e-4, 0.0, 4, 1, 200, 5 / 200, 200, 1.0, 1e-3),
    "navier_stokes_1d": ("adamw", 1e-4, 1e-3, 4, 1, 200, 5 / 200, 200, 1.0, 1e-3),
    "darcy_2d": ("adamw", 1e-4, 1e-5, 4, 1, 100, 5 / 200, 200, 0.0, 1e-3),
    "shallow_water": ("adamw", 1e-4, 0.0, 4, 1, 200, 10 / 200, 200, 1.0, 1e-3),
    "diffusion_reaction_2d": ("adam", 1e-4, 1e-3, 4, 1, 200, 5 / 200, 200, 1.0, 1e-3),
}
# Theirs are 128 samples (64) of each class, one class after the other; 1280 (640) are 10 classes'.
OWN = {"psicov": {"align_samples": 64}, "ninapro": {"align_epochs": 100}}  # 64: of 57 channels
OWN |= {"cifar100": {"augment": True}}
OWN |= {"ecg": {"momentum": 0.99, "patches": 64}, "deepsea": {"align_samples": 640}}
OWN |= {"diffusion_reaction_1d": {"momentum": 0.99, "patches": 256}}
OWN |= {"diffusion_sorption": {"patches": 32}, "navier_stokes_1d": {"patches": 128}}

SERIES = ("ecg", "satellite", "deepsea", *PDES[:5])
ALL = {"data": "real", "beta2": 0.98, "align_epochs": 60, "align_steps_per_epoch": 1}
ALL |= {"align_drop": 20, "align_samples": 1280, "source_size": 5000}  # of all classes together
KIND = {  # by whether it is a series; the bodies are bodies.ROBERTA_BASE and bodies.SWIN_BASE
    True: {
        "source": "conll2003",
        "patches": 512,
        "body": "FacebookAI/roberta-base@e2da8e2f811d1448a5b465c236feacd80ffbac7b",
    },
    False: {
        "source": "cifar10",
        "patches": 3136,
        "body": "swin_base_patch4_window7_224.ms_in22k",
    },
}
ORCA = {
    task: ALL
    | KIND[task in SERIES]
    | {"published": task in PDES}
    | dict(zip(COLUMNS, row, strict=True))
    | {"body_lr": row[1]}
    | OWN.get(task, {})
    for task, row in ROWS.items()
}

# ---- PaRe: ORCA's but for these. k0, k_end and mix_weight are the source's share in training ----

CLASSES = {"k0": 2000, "k_end": 525, "mix_weight": 1.0}  # images with classes or labels
FIELDS = {"k0": 1000, "k_end": 505, "mix_weight": 0.3}  # images with dense targets
FIELDS |= {"source": "voc", "source_size": 1464}  # all images of its training set that have masks
TEXT = {"k0": 32, "k_end": 0, "mix_weight": 0.1}  # series
CHANGES = {
    "cifar100": CLASSES,
    "spherical": CLASSES | {"source": "tiny_imagenet", "accumulate": 8},
    "darcy": FIELDS,
    "psicov": FIELDS,  # k0 and k_end were not published
    "cosmic": FIELDS | {"k0": 500, "k_end": 8},
    "ninapro": CLASSES | {"accumulate": 2, "weight_decay": 1e-5 / 2, "clip": 0.5},
    "fsd50k": CLASSES | {"lr": 3e-5, "k_end": 515},
    "ecg": TEXT
    | {"optimizer": "adamw", "lr": 3e-5, "weight_decay": 0.1, "accumulate": 1, "k_end": 2},
    "satellite": TEXT | {"accumulate": 1},
    "deepsea": TEXT | {"epochs": 25, "k_end": 1},
    # PaRe's settings for PDEs were not published: those of the same kind of task
    **dict.fromkeys(("advection", "burgers", "diffusion_reaction_1d", "navier_stokes_1d"), TEXT),
    "diffusion_sorption": TEXT | {"k0": 22},  # of 32 patches
    **dict.fromkeys(("darcy_2d", "shallow_water", "diffusion_reaction_2d"), FIELDS),
}
PARE = {task: row | {"lam": "k/N"} | CHANGES[task] for task, row in ORCA.items()}
PARE = {task: row | {"body_lr": row["lr"]} for task, row in PARE.items()}
