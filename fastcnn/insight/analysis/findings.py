"""What an analysis finds in an observation: figures, chosen images, Grad-CAM, feature maps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcnn.archs.elementary import Elementary
from fastcnn.data.images import Files
from fastcnn.insight.analysis.calibration import Calibration, calibrate
from fastcnn.insight.analysis.classes import ClassFigures, class_figures, confusion_counts
from fastcnn.insight.analysis.feature_maps import feature_maps, first_filters
from fastcnn.insight.analysis.gradcam import enlarged, gradcam
from fastcnn.insight.analysis.predict_split import Observation

BATCH = 32  # images at a time that gradients are computed for


@dataclass(frozen=True)
class Picked:
    """Some of the images by their places in the split, and their pixels, uint8 (n, H, W, 3)."""

    places: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Findings:
    """Everything that an analysis found.

    confidence: float64 (n,), the probability of the predicted class. grids: by name, wrong, right,
    random. cams: by name, wrong and right: the images with their maps for the predicted and for the
    true class, (n, H, W) each. maps: a list a figure of (operation, (K, P, Q)), of the image
    `shown`. filters: (K, R, S, 3).
    """

    seen: Observation
    counts: np.ndarray
    figures: ClassFigures
    calibration: Calibration
    confidence: np.ndarray
    grids: dict[str, Picked]
    operation: str
    cams: dict[str, tuple[Picked, np.ndarray, np.ndarray]]
    shown: Picked
    maps: list[list[tuple[str, np.ndarray]]]
    filters: np.ndarray


def find(
    seen: Observation, operation: str, shown: list[tuple[str, ...]], samples: int, seed: int
) -> Findings:
    """Compute everything that is drawn and written of an observation."""
    classes = len(seen.trained.classes)
    counts = confusion_counts(seen.labels, seen.predicted, classes)
    confidence = seen.probabilities.max(1)
    places = choose_images(seen.labels, seen.predicted, confidence, samples, seed)
    grids = {name: _picked(seen, chosen) for name, chosen in places.items()}
    network = Elementary(seen.trained.model).to(seen.device)
    drawn = _picked(seen, places["random"][:1])
    image = _normalised(seen, drawn.pixels)[0]
    maps = [list(feature_maps(network, image, names).items()) for names in shown]
    cams = {}
    for name in ("wrong", "right"):
        picked = grids["wrong"] if name == "wrong" else _picked(seen, places["random_right"])
        if len(picked.places):
            cams[name] = (picked, *_both_maps(seen, network, operation, picked))
    return Findings(
        seen,
        counts,
        class_figures(counts),
        calibrate(seen.logits, seen.labels),
        confidence,
        {name: grids[name] for name in ("wrong", "right", "random")},
        operation,
        cams,
        drawn,
        maps,
        first_filters(seen.trained.model),
    )


def choose_images(
    labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, samples: int, seed: int
) -> dict[str, np.ndarray]:
    """The places of at most `samples` images each: the wrong ones of the largest confidence first,
    the right ones of the least, and, drawn by the seed, any and right ones."""
    right = labels == predicted
    rising = np.argsort(confidence, kind="stable")
    falling = np.argsort(-confidence, kind="stable")
    drawn = np.random.default_rng(seed).permutation(len(labels))
    return {
        "wrong": falling[~right[falling]][:samples],
        "right": rising[right[rising]][:samples],
        "random": drawn[:samples],
        "random_right": drawn[right[drawn]][:samples],
    }


def _picked(seen: Observation, places: np.ndarray) -> Picked:
    return Picked(places, seen.images.pixels_of(places))


def _normalised(seen: Observation, pixels: np.ndarray) -> Tensor:
    """Images as the network takes them: fp32 (n, 3, H, W)."""
    images = torch.from_numpy(pixels).to(seen.device)
    return seen.trained.normalization.apply(images).permute(0, 3, 1, 2)


def _both_maps(
    seen: Observation, network: Elementary, operation: str, picked: Picked
) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM for the predicted and for the true classes, as large as the images."""
    found = []
    for classes in (seen.predicted, seen.labels):
        parts = []
        for start in range(0, len(picked.places), BATCH):
            part = slice(start, start + BATCH)
            images = _normalised(seen, picked.pixels[part])
            wanted = torch.from_numpy(classes[picked.places[part]]).to(seen.device)
            maps = gradcam(network, images, operation, wanted)
            parts.append(enlarged(maps, seen.images.sides).cpu().numpy())
        found.append(np.concatenate(parts))
    return found[0], found[1]


def name_of(seen: Observation, place: int) -> str:
    """The path of an image's file, or its place in the split where there are no files."""
    return str(seen.images.paths[place]) if isinstance(seen.images, Files) else str(place)
