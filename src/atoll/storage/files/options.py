"""Options that all drivers of image files share."""

from atoll.storage.contract import Option

OPTIONS = (
    Option(name="path", description="directory that holds the images", required=True),
    Option(
        name="mount",
        description="mount point that the directory must lie on (auto: any but / for shared pools; none: not checked)",
        default="auto",
    ),
    Option(name="preallocation", description="reserve the space of new images", default="off", choices=("off", "falloc", "full")),
    Option(
        name="locking",
        description="take file locks on open images; off for file systems that cannot (writers becomes none)",
        default="on",
        choices=("on", "off"),
    ),
)
