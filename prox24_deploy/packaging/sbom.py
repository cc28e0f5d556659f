"""A bill of materials of a bundle, as CycloneDX 1.6 JSON.

https://cyclonedx.org/docs/1.6/json says what every field means. The library that writes it comes
with the extra `sbom`.
"""

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prox24_deploy.bundle.manifest import Manifest
from prox24_deploy.core.errors import BackendMissingError, BundleError
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.foreign import blamed
from prox24_deploy.core.records import ModelInfo, PruneResult

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

_NOT_A_LIBRARY = {"prox24-deploy", "python"}
_NAMESPACE = uuid.UUID("b7a3f1de-5d0a-5a0e-9c39-24b1f0b6c0de")


def render_sbom(manifest: Manifest, pruned: PruneResult, built_with: Mapping[str, str]) -> str:
    """The bill of materials of a finished bundle, valid by the schema of CycloneDX.

    What it is of is the pruned model, whose ancestor is the source model; it lists the tool, the
    libraries and every file of the bundle with its hash. Only its time stamp differs from one call
    to the next.

    Args:
        manifest: of the bundle.
        pruned: result of the pruning stage, with the hash of the pruned weights.
        built_with: versions of libraries that compiled engines and are not in the manifest.

    Raises:
        BackendMissingError: the library is not installed, or without its validator.
        BundleError: the manifest names no model, or says what an SBOM cannot hold.
    """
    try:
        from cyclonedx.exception import MissingOptionalDependencyException
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise _missing(error) from error
    # A manifest may say what CycloneDX has no place for, such as a hash that is none.
    with blamed(_unfit):
        text = JsonV1Dot6(_bom(manifest, pruned, built_with)).output_as_string(indent=2) + "\n"
    try:
        fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except MissingOptionalDependencyException as error:
        raise _missing(error) from error
    if fault is not None:
        raise _unfit(str(fault).splitlines()[0])
    return text


def _unfit(reason: str) -> BundleError:
    return BundleError(
        f"The bundle says of itself what no SBOM of CycloneDX 1.6 can hold ({reason}); build it "
        "again."
    )


def _missing(error: Exception) -> BackendMissingError:
    return BackendMissingError(
        f"An SBOM needs cyclonedx-python-lib with its validator, which cannot be imported "
        f"({error}); {install_of('sbom')}."
    )


def _bom(manifest: Manifest, pruned: PruneResult, built_with: Mapping[str, str]) -> "Bom":
    from cyclonedx.model.bom import Bom, BomMetaData

    if manifest.model is None:
        raise BundleError("The manifest names no model; build the bundle again.")
    source = _source(manifest.model)
    main = _pruned(manifest, manifest.model, pruned, source)
    tool = _tool(manifest)
    libraries = [
        _library(name, version)
        for name, version in {**manifest.versions, **built_with}.items()
        if name not in _NOT_A_LIBRARY and version != "not installed"
    ]
    files = [_file(name, entry.sha256) for name, entry in manifest.files.items()]
    bom = Bom(
        components=[source, tool, _python(manifest), *libraries, *files],
        serial_number=uuid.uuid5(_NAMESPACE, manifest.self_sha256),
        metadata=BomMetaData(component=main),
    )
    bom.register_dependency(main, [source, tool, *files])
    bom.register_dependency(tool, [_python(manifest), *libraries])
    return bom


def _source(model: ModelInfo) -> "Component":
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=model.title,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="source-model",
        description=f"{model.architecture} as it was before pruning; the hash is of its files.",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=model.sha256)],
        properties=[
            Property(name="prox24:model_type", value=model.model_type),
            Property(name="prox24:task", value=model.task),
            Property(name="prox24:parameters", value=str(model.parameters)),
        ],
    )


def _pruned(
    manifest: Manifest, model: ModelInfo, pruned: PruneResult, source: "Component"
) -> "Component":
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    return Component(
        name=f"{model.title}-2of4",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="pruned-model",
        description="Pruned to 2:4 semi-structured sparsity; the hash is of its weight files.",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=pruned.state_sha256)],
        pedigree=Pedigree(ancestors=[source]),
        properties=[
            Property(name="prox24:verdict", value=manifest.verdict),
            Property(name="prox24:manifest_sha256", value=manifest.self_sha256),
            Property(name="prox24:method", value=pruned.method),
        ],
    )


def _tool(manifest: Manifest) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=manifest.tool,
        version=manifest.tool_version,
        type=ComponentType.APPLICATION,
        bom_ref="tool",
        description="Made the bundle.",
    )


def _python(manifest: Manifest) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name="python",
        version=manifest.versions.get("python"),
        type=ComponentType.PLATFORM,
        bom_ref="python",
    )


def _library(name: str, version: str) -> "Component":
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"library:{name}",
        purl=PackageURL("pypi", name=name.replace("_", "-"), version=version),
    )


def _file(name: str, sha256: str) -> "Component":
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=name,
        type=ComponentType.FILE,
        bom_ref=f"file:{name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
    )
