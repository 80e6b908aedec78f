// NODE_OPTIONS=--require=loopback.cjs: every host name below TIFFIN_DOMAIN leads to this machine, as wildcard DNS would have it.
// The 0.x client under test is as it was published; it connects to 49982-<sandbox>-<client>.<domain>[:port].

const dns = require('node:dns')

const lookup = dns.lookup
dns.lookup = function (name, options, callback) {
  const isOurs = typeof name === 'string' && name.endsWith('.' + process.env.TIFFIN_DOMAIN.replace(/:\d+$/, ''))
  return lookup.call(this, isOurs ? '127.0.0.1' : name, options, callback)
}
