"""Make a video again from its own manifest, and compare the two files.

A manifest is not trusted. Its request is resolved like that of a client, and the result must equal the manifest. The
caller gives the inputs, whose digests must be those in the manifest, and the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.inputs import Prepared, prepare
from kinema.manifest import InputFile, Manifest, Recipe, Role, read_tag
from kinema.media.film import digest_pictures, read_comment
from kinema.request.capabilities import Capabilities
from kinema.request.options import NOTHING_GIVEN, GenerationOptions, Given
from kinema.request.shapes import Size

_FLAGS: dict[Role, str] = {
    "first_frame": "--image",
    "last_frame": "--last-frame",
    "control_video": "--control-video",
    "reference_images": "--reference-image",
    "conditioning": "--conditioning",
}
_NEEDED: dict[Role, str] = {
    "continues": "it continues a film; give that film with --video",
    "edits": "it was made from a film; give that film with --video",
    "first_frame": "it was made from a first frame; give that image with --image",
    "last_frame": "it was made from a last frame; give that image with --last-frame",
    "control_video": "it was made by films of control; give each with --control-video",
    "reference_images": "it was made by reference images; give each with --reference-image",
    "conditioning": "it was made from pictures of single frames; give each with --conditioning FRAME=FILE",
}
_OTHER: dict[Role, str] = {
    "continues": "--video is not the film that it continues",
    "edits": "--video is not the film that it was made from",
    "first_frame": "--image is not the first frame that it was made from",
    "last_frame": "--last-frame is not the last frame that it was made from",
    "control_video": "--control-video is not the film that it was made by",
    "reference_images": "--reference-image is not the picture that it was made by",
    "conditioning": "--conditioning is not the picture that it was made from",
}


_REPLAYED = "give an MP4 or WebM file that Kinema made"


def read_manifest(path: Path) -> Manifest:
    """The manifest in a film. Raises InvalidRequest for another file, and for a film without a manifest."""
    if path.suffix.lower() == ".gif":
        raise InvalidRequest(f"{path}: a GIF does not say how it was made; {_REPLAYED}")
    try:
        comment = read_comment(path)
    except InvalidRequest as exc:
        raise InvalidRequest(f"{path}: {exc.message}") from exc
    except OSError as exc:
        raise InvalidRequest(f"{path}: {exc.strerror}; {_REPLAYED}") from exc
    try:
        return read_tag(comment)
    except InvalidRequest as exc:
        raise InvalidRequest(f"{path} {exc.message}") from exc


def prepare_again(
    path: Path,
    manifest: Manifest,
    can: Capabilities,
    given: Given = NOTHING_GIVEN,
    *,
    is_model_given: bool = False,
) -> Prepared:
    """Prepare the request of the film at ``path`` for this model. Raises RequestError when it would give another video.

    ``given`` has the inputs, and in ``edits`` the film, also where that is continued.

    A model with another name is refused unless ``is_model_given``: a model may have several names, for instance that of
    its folder and that on the hub.
    """
    recipe = manifest.request
    if manifest.made_by.engine != can.engine:
        raise InvalidRequest(f"{path} was made by the engine {manifest.made_by.engine!r}; give it with --engine")
    if recipe.model not in can.names and not is_model_given:
        raise InvalidRequest(f"{path} was made by the model {recipe.model!r}, not {can.model!r}; give it with --model")
    roles = {file.role for file in manifest.inputs}
    _check_given(path, roles, given)
    if "continues" in roles:
        given = Given(continues=given.edits)
    prepared = prepare(given, _options(recipe), can)
    _check_inputs(path, manifest.inputs, prepared.described())
    made = Recipe.of(prepared.request).model_copy(update={"model": recipe.model})
    if made != recipe:
        changed = [name for name in Recipe.model_fields if getattr(made, name) != getattr(recipe, name)]
        raise UnsupportedRequest(f"{path} cannot be made again by this model: {', '.join(changed)} would differ")
    return prepared


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the two files are the same, and one sentence about it."""

    is_same: bool
    sentence: str


def compare(original: Path, again: Path) -> Verdict:
    """Compare two films byte by byte, and name what may explain a difference."""
    if _sha256(original) == _sha256(again):
        return Verdict(True, "the same bytes")
    differences = read_manifest(original).differences(read_manifest(again))
    because = ", ".join(differences) or "nothing that the manifests name; the file may have been changed"
    if digest_pictures(original) == digest_pictures(again):
        return Verdict(False, f"the same pictures in a different file; what differs: {because}")
    return Verdict(False, f"different pictures; what differs: {because}")


def _options(recipe: Recipe) -> GenerationOptions:
    """The options with every value of the manifest, so that no preset fills a gap."""
    fields = recipe.model_dump(include=set(GenerationOptions.model_fields))
    fields["loras"] = fields["loras"] or ()
    fields["kept_tier"] = fields.pop("tier")  # the values are here, whatever the model's tier of that name has now
    if not (0 < recipe.width < 10**6 and 0 < recipe.height < 10**6):
        raise InvalidRequest("the size in the manifest is not a size")
    return GenerationOptions(**fields, size=str(Size(width=recipe.width, height=recipe.height)))


def _check_given(path: Path, roles: set[Role], given: Given) -> None:
    """Raises InvalidRequest unless exactly the files that the manifest needs are given."""
    is_film = bool(roles & {"continues", "edits"})
    if is_film and given.edits is None:
        raise InvalidRequest(f"{path}: {_NEEDED['continues' if 'continues' in roles else 'edits']}")
    if given.edits is not None and not is_film:
        raise InvalidRequest(f"{path} was made without a film; leave --video out")
    own = set() if is_film else roles  # the first frame of an extension is the last one of its film
    pictures: tuple[tuple[Role, object], ...] = (
        ("first_frame", given.image),
        ("last_frame", given.last_frame),
        ("control_video", given.control_video or None),
        ("reference_images", given.reference_images or None),
        ("conditioning", given.conditioning or None),
    )
    for role, picture in pictures:
        if role in own and picture is None:
            raise InvalidRequest(f"{path}: {_NEEDED[role]}")
        if role not in own and picture is not None:
            raise InvalidRequest(
                f"{path} was made without a {role.replace('_', ' ')} of its own; leave {_FLAGS[role]} out"
            )


def _check_inputs(path: Path, meant: tuple[InputFile, ...], given: tuple[InputFile, ...]) -> None:
    for file in sorted(meant, key=lambda file: file.role):  # the film before the frame that comes from it
        if file not in given:
            raise InvalidRequest(f"{path}: {_OTHER[file.role]}")
    if sorted(meant, key=lambda file: file.role) != sorted(given, key=lambda file: file.role):
        raise InvalidRequest(f"{path}: its manifest does not name all of its inputs")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
