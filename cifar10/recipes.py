"""Named recipes: --recipe NAME, with whatever flags beside it. Knows no torch: flags are parsed before it is loaded.

Under each recipe: its command, the accuracy to expect on CIFAR-10's test images, time and hardware. Accuracies come
from run records (README.md beside this file, "Results"); where no run has been made yet, it says so.
"""

from dataclasses import replace

from distill.config.recipe import Recipe
from distill.losses.kd_loss import KD

STUDENT = Recipe(arch="efficientnet_b0", epochs=60)
"""EfficientNet-B0 by cross-entropy: SGD Nesterov 0.1, batch 128, 5 epochs of warm-up, cosine, weight decay 5e-4.

bash scripts/trainCE.sh
Accuracy: not measured yet. Time: 3.7 h on 2 CPU cores at 220 s an epoch.
"""

TEACHER = replace(STUDENT, arch="resnext29_2x64d", cutout=16)
"""Any network as a teacher: the same with cutout of 16 pixels (DeVries and Taylor 2017, arXiv:1708.04552), and no label
smoothing: smoothed teachers teach worse (Mueller et al. 2019, arXiv:1906.02629). lr 0.1 is for 128 images.

bash scripts/trainCE.sh --recipe teacher --arch resnet152
Accuracy: not measured yet. Time: for a GPU; on a CPU take short_teacher.
"""

DEFAULT_KD = replace(STUDENT, teacher_arch=TEACHER.arch, method=KD(T=3.0, w=0.8))
"""The student of `student` taught, with the original repository's T and w.

bash scripts/trainKD.sh
Accuracy: not measured yet. Time: that of `student`, after its teacher's 60 epochs and with its answers: for a GPU.
"""

STUDENT_KD = replace(DEFAULT_KD, method=KD(T=4.0, w=0.9), ema=0.999, dropout=0.0)
"""The recommended form: softer, with more of the teacher, the average of the weights, and no dropout, since the teacher
already regularises.

bash scripts/trainKD.sh --recipe student_kd --teacher-arch resnet152
Accuracy: not measured yet. Time: as `kd`.
"""

LONG_STUDENT = replace(STUDENT, epochs=300, batch_size=256, lr=0.2)
"""The student, trained until it gains no more: for a GPU.

bash scripts/reproduce.sh cifar10 --only student
Not run yet: it takes a GPU.
"""

LONG_STUDENT_KD = replace(
    LONG_STUDENT, teacher_arch="resnet152", method=KD(T=4.0, w=0.9), weight_decay=2e-4, ema=0.999, dropout=0.0
)
"""The same taught, less regularised, as the teacher does that; the average of the weights.

bash scripts/reproduce.sh cifar10 --only student-kd-resnet152
Not run yet: it takes a GPU.
"""

LONG_STUDENT_FINETUNE = replace(LONG_STUDENT, epochs=60, lr=0.02)
"""The student trained by CE once more without a teacher: what the next one is to be compared with.

bash scripts/reproduce.sh cifar10 --only student-finetuned
Not run yet: it takes a GPU.
"""

LONG_STUDENT_FINETUNE_KD = replace(LONG_STUDENT_KD, epochs=60, lr=0.02)
"""Taught from the student trained by CE, as the original did it.

bash scripts/reproduce.sh cifar10 --only student-kd-resnet152-finetuned
Not run yet: it takes a GPU.
"""

PATIENT_STUDENT_KD = replace(LONG_STUDENT_KD, epochs=900, views=60, mixup=True)
"""The patient form (Beyer et al. 2021, arXiv:2106.05237): mixtures by uniform shares, the same for teacher and student,
and many epochs. The teacher answers 60 views of an image.

bash scripts/trainKD.sh --recipe patient_student_kd --teacher-arch resnet152
Not run yet: it takes a GPU.
"""

ORIGINAL = Recipe(
    lr=0.1,
    batch_size=256,
    weight_decay=0.0,
    schedule="restarts",
    warmup=0.0,
    augment="original",
    epochs=60,
)
"""As the original repository trained: SGD 0.1 without weight decay, cosine restarts every 10 epochs, batch 256, its
transforms. Its momentum and number of epochs are not known to us: Nesterov 0.9, 60.

bash scripts/trainCE.sh --recipe original
Accuracy: 90.67 there; not measured here yet. Time: 3.7 h on 2 CPU cores.
"""

ORIGINAL_KD = replace(ORIGINAL, teacher_arch="resnet152", method=KD(T=3.0, w=0.8))
"""The same taught; it started from the student trained by CE: --init checkpoints/cifar10/efficientnet_b0/RUN/last.pt.

bash scripts/trainKD.sh --recipe original_kd --init FILE
Accuracy: 92.12 there; its KL term was ten times weaker (README.md, "The original repository"). Not measured here.
"""

SHORT_TEACHER = replace(STUDENT, arch="resnet18", epochs=12, schedule="onecycle", precision="bfloat16")
"""A teacher that a CPU can train: ResNet-18 by one cycle, in bfloat16, which is 2.3 x faster where there is AMX.

bash scripts/trainCE.sh --recipe short_teacher
Accuracy: 91.19 (one seed), densenet40 89.50. Time: 12 epochs of 5 minutes on 2 CPU cores with AMX, of densenet40 11.
"""

AIRBENCH94_TEACHER = replace(
    SHORT_TEACHER,
    arch="airbench94",
    epochs=30,
    lr=0.2,
    weight_decay=1e-3,
    momentum=0.85,
    bias_lr=64.0,
    padding=2,
    reflect=True,
    alternate_flip=True,
)
"""The teacher that a CPU trains soonest. Of its author's choices (Jordan 2024, arXiv:2404.00498) it has the momentum,
the rate for BatchNorm's biases, reflected padding and alternating flips, but no label smoothing: without that the
network is as accurate and teaches better (README.md beside this file, "On CPU cores"). On 5,000 held-out images after 4
epochs: these with label smoothing of 0.2 90.34, without it 89.94, without the rate for BatchNorm's biases 90.02, none
of them 89.54.

bash scripts/trainCE.sh --recipe airbench94_teacher
Accuracy: 94.00 (one seed). Time: 56 minutes on 1 CPU core that multiplies bfloat16, beside another run.
"""

PRETRAINED_TEACHER = Recipe(
    arch="efficientnet-lite0",
    pretrained=True,
    epochs=12,
    batch_size=64,
    lr=0.02,
    schedule="onecycle",
    bn_momentum=0.1,
)
"""A teacher with ImageNet weights: one of ImageNet's networks, with a new last layer, sees the images enlarged to 96
pixels. BatchNorm's statistics must follow small images sooner than those of its authors. With every third of 45,000
training images and 3 epochs it came to 90.08 on the 5,000 others, with lr 0.05 to 89.42, weight decay 1e-4 89.86,
bfloat16 89.76.

bash scripts/trainCE.sh --recipe pretrained_teacher
Accuracy: 95.21 (one seed). Time: 3.8 h on 1 CPU core, beside much other work.
"""

SHORT_STUDENT = replace(STUDENT, epochs=20, warmup=2.0, dropout=0.0)
"""The student in an hour or two on 2 CPU cores: 20 epochs, 2 of them warm-up, no dropout.

bash scripts/trainCE.sh --recipe short_student
Accuracy: 90.11 and 90.22 (two seeds). Time: 1.6 h on 1 CPU core, 4.1 h beside much other work.
"""

SHORT_STUDENT_KD = replace(SHORT_STUDENT, teacher_arch=SHORT_TEACHER.arch, method=KD(T=4.0, w=0.9))
"""The same with a teacher.

bash scripts/trainKD.sh --recipe short_student_kd --teacher-arch airbench94 --teacher-checkpoint published
Accuracy (one seed): 90.92 from an airbench94 of 91.94, 89.90 from a resnet18 of 91.19. Time: 2 hours on 1 CPU core.
"""

CPU_STUDENT = replace(STUDENT, dropout=0.0, sizes="24:36")
"""The student in hours on 2 CPU cores: 60 epochs, the first 36 of them at 24 pixels, no dropout. What else was tried:
README.md beside this file, "How the recipe of 60 epochs was chosen".

bash scripts/reproduce.sh cifar10 --budget cpu --only student --seeds 1
Accuracy: 92.01 (one seed). Time: 2.8 h on 1 CPU core beside another run.
"""

CPU_STUDENT_KD = replace(CPU_STUDENT, teacher_arch="airbench94", method=KD(T=4.0, w=0.9))
"""The same with a teacher.

bash scripts/reproduce.sh cifar10 --budget cpu --only student-kd-airbench94 --teacher-checkpoint published --seeds 1
Accuracy: 93.02 and 93.03 (two seeds). Time: 2.9 h on 1 CPU core beside another run; half an hour more where the
teacher's logits are not stored yet.
"""

CPU_STUDENT_FINETUNE = replace(CPU_STUDENT, epochs=20, lr=0.02, warmup=2.0, sizes=None)
"""The student trained by CE once more without a teacher: what the next one is to be compared with.

bash scripts/reproduce.sh cifar10 --budget cpu --only student-finetuned
Not run yet.
"""

CPU_STUDENT_FINETUNE_KD = replace(CPU_STUDENT_KD, epochs=20, lr=0.02, warmup=2.0, sizes=None)
"""Taught from the student trained by CE, as the original did it.

bash scripts/reproduce.sh cifar10 --budget cpu --only student-kd-airbench94-finetuned
Not run yet.
"""

SAMPLE_STUDENT = replace(STUDENT, epochs=3, batch_size=32, lr=0.02, warmup=1.0)
"""The embedded sample in minutes on 2 CPU cores: small batches, few epochs; lr chosen from 0.02, 0.05, 0.1 on
--val-split 500.

bash scripts/trainCE.sh --data sample --recipe sample_student        39.90 %, 69 s on 1 CPU core
"""

SAMPLE_TEACHER = replace(SAMPLE_STUDENT, arch="resnet18", epochs=4)
"""bash scripts/trainCE.sh --data sample --recipe sample_teacher      49.30 %, 166 s"""

SAMPLE_STUDENT_KD = replace(SAMPLE_STUDENT, teacher_arch=SAMPLE_TEACHER.arch, method=KD(T=3.0, w=0.8))
"""bash scripts/trainKD.sh --data sample --recipe sample_student_kd   42.00 %, 43 s, from that teacher, in bfloat16"""

RECIPES = {
    "student": STUDENT,
    "teacher": TEACHER,
    "kd": DEFAULT_KD,
    "student_kd": STUDENT_KD,
    "long_student": LONG_STUDENT,
    "long_student_kd": LONG_STUDENT_KD,
    "long_student_finetune": LONG_STUDENT_FINETUNE,
    "long_student_finetune_kd": LONG_STUDENT_FINETUNE_KD,
    "patient_student_kd": PATIENT_STUDENT_KD,
    "original": ORIGINAL,
    "original_kd": ORIGINAL_KD,
    "short_teacher": SHORT_TEACHER,
    "airbench94_teacher": AIRBENCH94_TEACHER,
    "pretrained_teacher": PRETRAINED_TEACHER,
    "short_student": SHORT_STUDENT,
    "short_student_kd": SHORT_STUDENT_KD,
    "cpu_student": CPU_STUDENT,
    "cpu_student_kd": CPU_STUDENT_KD,
    "cpu_student_finetune": CPU_STUDENT_FINETUNE,
    "cpu_student_finetune_kd": CPU_STUDENT_FINETUNE_KD,
    "sample_student": SAMPLE_STUDENT,
    "sample_teacher": SAMPLE_TEACHER,
    "sample_student_kd": SAMPLE_STUDENT_KD,
}
