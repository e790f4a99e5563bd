"""The user's folder of configurations (`a2sf run --config-dir`) as a source of Hydra's search path."""

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from a2sf.sweep.config import folder as config_dir


class OwnFolder(FileConfigSource):
    """A folder in which a subfolder with the name of a key, such as `tasks/`, is not a group of configurations."""

    @staticmethod
    def scheme() -> str:
        return config_dir.SCHEME

    def is_group(self, config_path: str) -> bool:
        return not config_dir.is_key(config_path) and super().is_group(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found = super().list(config_path, results_filter)
        return found if config_path else [name for name in found if not config_dir.is_key(name)]


class OwnFolderPath(SearchPathPlugin):
    """Adds the user's folder to the search path, after the configurations of the package."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if (folder := config_dir.used()) is not None:
            search_path.append("command-line", f"{config_dir.SCHEME}://{folder.expanduser().absolute()}")
