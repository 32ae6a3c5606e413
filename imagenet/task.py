"""Photos as a run needs them, and where their teacher comes from: a file, or its published weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.data.datasets import Images, TestData, TrainingData
from distill.errors import UserError
from distill.models import weights as files
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier, InputSpec
from distill.models.network import Network, fetch, raw_or_ema, torchvision_weights
from distill.models.weights import Weights
from distill.parallel.processes import on_main
from distill.run.run import Run
from distill.teacher.ensemble import member_files
from distill.training.task import Task
from imagenet import models
from imagenet.data import PhotoData, Photos, PhotoTestData, known_to, load_data, prepare
from imagenet.loader import Workers
from imagenet.models import CLASSES
from imagenet.recipes import ImageNetOptions, ImageNetRecipe
from imagenet.survey import survey

RANDOM = "none"  # --teacher-checkpoint none: no weights at all


class PhotoTask(Task[ImageNetRecipe, ImageNetOptions]):
    """ImageNet, or other photos in folders; they are decoded by processes each time they are shown."""

    data: Photos

    def __init__(self, recipe: ImageNetRecipe, options: ImageNetOptions, images: Images | None = None) -> None:
        """Lists the photos of `options`, unless `images` are given. Raises UserError."""
        self.workers = Workers(options.workers, options.loader_minutes)
        self._files: dict[tuple[str, str | None], Weights] = {}
        super().__init__(recipe, options, images)
        self.decoder = self.recipe.decoder

    def close(self) -> None:
        """Ends the processes that decode."""
        self.workers.close()

    def resolve(self, recipe: ImageNetRecipe) -> ImageNetRecipe:
        """Returns the recipe with networks named as in files. Raises UserError for an unknown name."""
        pairs = zip(recipe.teacher_archs, member_files(recipe, self.options), strict=True)
        self._teacher_networks = [
            self._teacher_network(replace(recipe, teacher_arch=arch), replace(self.options, teacher_checkpoint=file))
            for arch, file in pairs
        ]
        teachers = ",".join(network.arch for network in self._teacher_networks) or None
        if teachers and not self.options.kd:
            print(f"--teacher-arch {teachers}: it teaches, as with --kd")
        return replace(recipe, arch=models.find(recipe.arch).arch, teacher_arch=teachers)

    def load_data(self) -> Photos:
        """Returns the photos that the options name."""
        return load_data(self.options.data, self.workers, skip_bad_images=self.options.skip_bad_images)

    def prepare(self, spec: InputSpec) -> tuple[PhotoData, dict[str, PhotoTestData]]:
        """Returns the training data, and by name what each epoch is evaluated on.

        Views are rendered for the teacher that sees the largest photos.
        """
        specs = [network.spec for network in self._teacher_networks]
        largest = max(specs, key=lambda spec: spec.size, default=None)
        return prepare(self.data, self.recipe, spec, largest, self.workers, self.device)

    def test_data(self, spec: InputSpec, split: str = "test", batch_size: int | None = None) -> PhotoTestData:  # noqa: ARG002
        """Returns the photos of a split as a network of `spec` is evaluated on them."""
        photos = self.data
        test = (photos.val_files, photos.val_labels)
        paths, labels = (photos.train_files, photos.train_labels) if split == "train" else test
        return PhotoTestData(paths, labels, spec, self.workers, self.device, self.recipe.decoder)

    def read_files(self, files: Sequence[str], spec: InputSpec) -> Iterator[Tensor]:
        """Yields the photos of `files` in parts, as a network of `spec` is evaluated on them. Raises BrokenImage."""
        labels = torch.zeros(len(files), dtype=torch.int64)
        data = PhotoTestData(files, labels, spec, self.workers, self.device, self.recipe.decoder)
        return (images for images, _ in data.batches())

    def build(self, options: ImageNetOptions) -> tuple[Classifier, str | None]:
        """Returns the student as it is before training, and the digest of the weights it was given, if any."""
        if options.init == "published":
            raise UserError("--init published is of small images: of photos --pretrained takes the published weights")
        return models.build_student(self.recipe, self.data.classes, options, self.device)

    def find(self, arch: str) -> Network:
        """Returns a network by its name, as the recipe's flags for the student want it."""
        return models.find(arch, torchvision_weights(self.recipe.weights)).at(self.recipe.image_size)

    def find_trained(self, arch: str, weights: Weights | None) -> Network:
        """Returns a network as its weights were trained, with the size and normalisation of the recipe's flags."""
        network = models.find_trained(arch, self.recipe.weights, weights).at(self.recipe.image_size)
        return network.shown(None, self.recipe.mean, self.recipe.std)

    def class_names(self, weights: Weights) -> ClassNames:
        """Returns the classes of the data, as they are compared with those of `weights`."""
        return models.class_names(self.data.classes, self.options.class_order, weights)

    def published(self, network: Network, flag: str) -> Weights:
        """Returns the published weights of `network`. Raises UserError; `flag` names a file in their place."""
        if len(self.data.classes) != CLASSES:
            raise UserError(
                f"the published {network.arch} knows {CLASSES} classes, the data has {len(self.data.classes)}: "
                f"train one on it, and name that by {flag} FILE"
            )
        return fetch(network, f"or name them by {flag} FILE")

    def adopt(self, run: Run) -> None:
        """Takes the photos for those of `run` if only files have changed that it found broken."""
        self.data = known_to(run, self.data)

    def survey(self, training: TrainingData, tests: Mapping[str, TestData]) -> None:
        """Decodes all test photos and the first training photos once. Raises BrokenImage."""
        survey(training, tests, self.workers)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------------ the teacher
    def teacher_network(self) -> Network:
        """Returns the network of the first teacher."""
        return self._teacher_networks[0]

    def find_teacher(
        self,
        recipe: ImageNetRecipe,
        options: ImageNetOptions,
        run: Run | None,  # noqa: ARG002
    ) -> tuple[Network, Weights | None]:
        """Returns the one teacher of `recipe` with the weights of --teacher-checkpoint, or its published ones."""
        network = self._teacher_network(recipe, options)
        if options.teacher_checkpoint == RANDOM:
            print(f"warning: --teacher-checkpoint {RANDOM}: {network.arch} has random weights, and knows nothing")
            return network, None
        weights = self._load_file(options, recipe)
        return network, weights or self.published(network, "--teacher-checkpoint")

    def _load_file(self, options: ImageNetOptions, recipe: ImageNetRecipe) -> Weights | None:
        """Returns what the file of --teacher-checkpoint holds, if there is one; a file is read once."""
        file, which = options.teacher_checkpoint, raw_or_ema(recipe.teacher_weights)
        if not file or file == RANDOM:
            return None
        if file == "published":
            raise UserError(
                "--teacher-checkpoint published is of small images: without it teachers of photos have theirs"
            )
        if (file, which) not in self._files:
            self._files[file, which] = on_main(files.load)(Path(file), which, "--teacher-weights")
        return self._files[file, which]

    def _teacher_network(self, recipe: ImageNetRecipe, options: ImageNetOptions) -> Network:
        weights = self._load_file(options, recipe)
        network = models.find_trained(recipe.teacher_arch or "", recipe.teacher_weights, weights)
        return network.at(recipe.teacher_image_size).shown(None, recipe.teacher_mean, recipe.teacher_std)
