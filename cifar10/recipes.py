"""Named recipes. Knows no torch: the flags are parsed with these before torch is loaded.

The accuracies they are meant for come in with the runs that measure them; see the README for what has been measured.
"""

from dataclasses import replace

from distill.recipe import Recipe

# bash scripts/trainCE.sh                      EfficientNet-B0 alone
STUDENT = Recipe(arch="efficientnet_b0")

# bash scripts/trainCE.sh --recipe teacher --arch resnet152
# No label smoothing: smoothed teachers teach worse (Mueller et al. 2019, arXiv:1906.02629).
TEACHER = Recipe(arch="resnext29_2x64d")

# bash scripts/trainKD.sh                      T and w are the original repository's
STUDENT_KD = replace(STUDENT, teacher_arch=TEACHER.arch, T=3.0, w=0.8)

# bash scripts/quickstart.sh                   the embedded sample, minutes on two CPU cores: small batches, few epochs
# lr chosen from 0.02, 0.05, 0.1 on --val-split 500
SAMPLE_STUDENT = replace(STUDENT, epochs=3, batch_size=32, lr=0.02, warmup=1.0)
SAMPLE_TEACHER = replace(SAMPLE_STUDENT, arch="resnet18", epochs=4)
SAMPLE_STUDENT_KD = replace(SAMPLE_STUDENT, teacher_arch=SAMPLE_TEACHER.arch)

RECIPES = {
    "student": STUDENT,
    "teacher": TEACHER,
    "student_kd": STUDENT_KD,
    "sample_student": SAMPLE_STUDENT,
    "sample_teacher": SAMPLE_TEACHER,
    "sample_student_kd": SAMPLE_STUDENT_KD,
}
