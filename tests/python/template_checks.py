"""Builds of templates through the client: the checks of gateway.py about them.

The gateway's local store has the image `e2e-base`, and its templates have `base`, which is made of it.
"""

import pathlib
import tempfile
import traceback
import uuid

import e2b

RUN = uuid.uuid4().hex[:8]
SIZE = {"cpu_count": 1, "memory_mb": 256}


def register(of):
    """Registers them with gateway.py, the module `of`."""
    check, both, do, raises = of.check, of.both, of.do, of.raises
    Template, Sandbox = of.Template, of.Sandbox
    box = f"box-{RUN}"
    built = {}

    @check("Template.build normal")
    async def build():
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "app").mkdir()
            (pathlib.Path(folder) / "app/hello.txt").write_text("hello\n")
            template = (
                Template(file_context_path=folder)
                .from_image("e2e-base")
                .copy("app", "/srv/app/", user="user", mode=0o640)
                .copy("app/hello.txt", "plain.txt", gzip=False)
                .set_envs({"GREETING": "from the template"})
                .run_cmd('cat /srv/app/hello.txt > said && echo "$(id -un) $GREETING" >> said')
                .run_cmd("id -u > /root/was-here", user="root")
                .set_start_cmd("echo on > /tmp/started; exec sleep 1000000", e2b.wait_for_file("/tmp/started"))
            )
            logs = []
            info = await do(Template.build(template, box, tags=["v1", "default"], on_build_logs=logs.append, **SIZE))
        built["info"] = info
        messages = [entry.message for entry in logs]
        assert messages.count("the template is ready") == 1, messages
        assert any("RUN cat /srv/app/hello.txt" in message for message in messages), messages
        sandbox = await do(Sandbox.create(box, timeout=600))
        try:
            said = (await do(sandbox.commands.run("cat said plain.txt; stat -c '%a %U' /srv/app/hello.txt; cat /tmp/started"))).stdout
            assert said == "hello\nuser from the template\nhello\n640 user\non\n", said
            assert (await do(sandbox.commands.run("sudo cat /root/was-here"))).stdout == "0\n"
            assert (await do(sandbox.get_info())).template_id == info.template_id
        finally:
            await do(sandbox.kill())

    @check("Template.build error")
    async def a_build_that_fails():
        template = Template().from_template(box).run_cmd("cat said")
        template = template.run_cmd("echo no such luck >&2; exit 3")
        logs = []
        error = await raises(
            e2b.BuildException, lambda: Template.build(template, f"bad-{RUN}", on_build_logs=logs.append, **SIZE), "exited with code 3"
        )
        assert "no such luck" in [entry.message for entry in logs]
        # The client shows the line of the step that the gateway has named.
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
        assert any("exit 3" in (line or "") for line in lines), lines
        await raises(e2b.BuildException, lambda: Template.build(Template().from_image("oci:/etc"), f"bad-{RUN}"), "invalid fromImage")
        await raises(e2b.BuildException, lambda: Template.build(template, "not a name"), "invalid template name")

    @check(*both("Template", "build_in_background", "get_build_status"))
    async def builds_in_the_background():
        dockerfile = "FROM e2e-base\nENV A=b\nWORKDIR /work\nRUN echo $A > a\n"
        info = await do(Template.build_in_background(Template().from_dockerfile(dockerfile), f"file-{RUN}", **SIZE))
        status = None

        async def is_ready():
            nonlocal status
            status = await do(Template.get_build_status(info))
            assert status.status.value != "error", status
            return status.status.value == "ready"

        await of.eventually(is_ready)
        assert status.log_entries and status.reason is None
        after = await do(Template.get_build_status(info, logs_offset=len(status.log_entries)))
        assert after.log_entries == [] or len(status.log_entries) == 100
        sandbox = await do(Sandbox.create(f"file-{RUN}", timeout=600))
        try:
            assert (await do(sandbox.commands.run("cat /work/a"))).stdout == "b\n"
        finally:
            await do(sandbox.kill())
        nobody = e2b.BuildInfo(alias="x", template_id="x", build_id="y", name="x", tags=[])
        await raises(e2b.BuildException, lambda: Template.get_build_status(nobody), "404")
        await raises(e2b.BuildException, lambda: Template.build_in_background(Template().from_template("none"), box), "not yours")

    @check(*both("Template", "assign_tags", "remove_tags", "get_tags"))
    async def tags():
        names = lambda: do(Template.get_tags(box))
        assert [tag.tag for tag in await names()] == ["default", "v1"]
        assigned = await do(Template.assign_tags(f"{box}:v1", ["stable"]))
        assert (assigned.build_id, assigned.tags) == (built["info"].build_id, ["stable"])
        assert await do(Template.exists(f"{box}:stable")) is True
        await do(Template.remove_tags(box, ["v1", "stable"]))
        assert [(tag.tag, tag.build_id) for tag in await names()] == [("default", built["info"].build_id)]
        assert await do(Template.exists(f"{box}:v1")) is False
        await raises(e2b.TemplateException, lambda: Template.get_tags("none"), "404")
        await raises(e2b.TemplateException, lambda: Template.assign_tags("none:x", "y"), "404")
        await raises(e2b.TemplateException, lambda: Template.remove_tags("base", "y"), "404")
