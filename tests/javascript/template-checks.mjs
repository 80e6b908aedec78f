// Builds of templates through the client: the checks of gateway.mjs about them.
//
// The gateway's local store has the image `e2e-base`, and its templates have `base`, which is made of it.

import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export function register({ e2b, check, both, raises, deadline }) {
  const { Sandbox, Template } = e2b
  const run = randomUUID().slice(0, 8)
  const box = `box-${run}`
  const size = { cpuCount: 1, memoryMB: 256 }
  let built

  check('Template.build normal', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'template-'))
    const logs = []
    try {
      mkdirSync(join(folder, 'app'))
      writeFileSync(join(folder, 'app/hello.txt'), 'hello\n')
      const template = Template({ fileContextPath: folder })
        .fromTemplate('base')
        .copy('app', '/srv/app/', { user: 'user', mode: 0o640 })
        .setEnvs({ GREETING: 'from the template' })
        .runCmd('cat /srv/app/hello.txt > said && echo "$(id -un) $GREETING" >> said')
        .runCmd('id -u > /root/was-here', { user: 'root' })
        .setStartCmd('echo on > /tmp/started; exec sleep 1000000', e2b.waitForFile('/tmp/started'))
      built = await Template.build(template, box, { tags: ['v1', 'default'], onBuildLogs: (entry) => logs.push(entry), ...size })
    } finally {
      rmSync(folder, { recursive: true })
    }
    const messages = logs.map((entry) => entry.message)
    assert.equal(messages.filter((message) => message === 'the template is ready').length, 1, messages.join('\n'))
    assert(messages.some((message) => message.includes('RUN cat /srv/app/hello.txt')), messages.join('\n'))
    const sandbox = await Sandbox.create(box, { timeoutMs: 600_000 })
    try {
      const { stdout } = await sandbox.commands.run("cat said; stat -c '%a %U' /srv/app/hello.txt; sudo cat /root/was-here /tmp/started")
      assert.equal(stdout, 'hello\nuser from the template\n640 user\n0\non\n')
      assert.equal((await sandbox.getInfo()).templateId, built.templateId)
    } finally {
      await sandbox.kill()
    }
  })

  check('Template.build error', async () => {
    const logs = []
    const template = Template().fromTemplate(box).runCmd('cat said').runCmd('echo no such luck >&2; exit 3')
    const build = () => Template.build(template, `bad-${run}`, { onBuildLogs: (entry) => logs.push(entry), ...size })
    const error = await raises(e2b.BuildError, build, 'exited with code 3')
    assert(logs.some((entry) => entry.message === 'no such luck'))
    // The client shows the line of the step that the gateway has named.
    assert(error.stack.includes('template-checks.mjs'), error.stack)
    await raises(e2b.BuildError, () => Template.build(Template().fromImage('oci:/etc'), `bad-${run}`), 'invalid fromImage')
    await raises(e2b.BuildError, () => Template.build(template, 'not a name'), 'invalid template name')
  })

  check(both('Template.buildInBackground, Template.getBuildStatus'), async () => {
    const template = Template().fromDockerfile('FROM e2e-base\nENV A=b\nWORKDIR /work\nRUN echo $A > a\n')
    const info = await Template.buildInBackground(template, `file-${run}`, size)
    const end = Date.now() + deadline
    let status
    do {
      assert(Date.now() < end, 'it never ends')
      status = await Template.getBuildStatus(info)
      assert.notEqual(status.status, 'error', JSON.stringify(status))
    } while (status.status !== 'ready')
    assert(status.logEntries.length > 0 && status.reason === undefined)
    const { logEntries } = await Template.getBuildStatus(info, { logsOffset: 1_000_000 })
    assert.deepEqual(logEntries, [])
    await raises(e2b.BuildError, () => Template.getBuildStatus({ templateId: 'x', buildId: 'y' }), '404')
    await raises(e2b.BuildError, () => Template.buildInBackground(Template().fromTemplate('none'), box), 'not yours')
  })

  check(both('Template.assignTags, Template.removeTags, Template.getTags'), async () => {
    const names = async () => (await Template.getTags(box)).map(({ tag }) => tag)
    assert.deepEqual(await names(), ['default', 'v1'])
    const assigned = await Template.assignTags(`${box}:v1`, 'stable')
    assert.deepEqual([assigned.buildId, assigned.tags], [built.buildId, ['stable']])
    assert.equal(await Template.exists(`${box}:stable`), true)
    await Template.removeTags(box, ['v1', 'stable'])
    assert.deepEqual(await names(), ['default'])
    await raises(Error, () => Template.getTags('none'), '404')
    await raises(Error, () => Template.assignTags('none:x', 'y'), '404')
    await raises(Error, () => Template.removeTags('base', 'y'), '404')
  })
}
