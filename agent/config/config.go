// SPDX-License-Identifier: Apache-2.0

// Package config reads bulkhead-agent.toml. It is strict: an unknown key, a
// value without its unit, a path that is not absolute is an error with file,
// line and the nearest name, and nothing has been touched by then.
//
// The sample bulkhead-agent.toml beside this file is the manual; a test parses
// it and compares it with the defaults.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/agext/levenshtein"
	"github.com/pelletier/go-toml/v2"

	"github.com/bulkheadhq/bulkhead/tenant"
)

// Sample is the manual: every key, its default, why one would change it.
//
//go:embed bulkhead-agent.toml
var Sample []byte

// Size is a number of bytes, written with a unit: "64MiB". It and the other
// quantities are structs so that a bare number in the file is refused.
type Size struct{ Bytes int64 }

// UnmarshalText reads a size with its unit.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := tenant.ParseSize(string(text))
	s.Bytes = n
	return valueErr("Size", text, err)
}

// CPU is a number of thousandths of a core, written "0.5" or "500m".
type CPU struct{ Millis int64 }

// UnmarshalText reads a number of cores.
func (c *CPU) UnmarshalText(text []byte) error {
	n, err := tenant.ParseCPU(string(text))
	c.Millis = n
	return valueErr("CPU", text, err)
}

// Duration is a time span with its unit: "30s".
type Duration struct{ time.Duration }

// UnmarshalText reads a duration with its unit.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return valueErr("Duration", text, fmt.Errorf("%q is not a duration such as \"30s\"", text))
	}
	d.Duration = v
	return nil
}

// PortRange is ports of the node, written "30000-30999", one port, or "" for
// none.
type PortRange struct{ Lo, Hi uint16 }

// UnmarshalText reads a range of ports.
func (r *PortRange) UnmarshalText(text []byte) error {
	*r = PortRange{}
	if len(text) == 0 {
		return nil
	}
	lo, hi, isRange := strings.Cut(string(text), "-")
	if !isRange {
		hi = lo
	}
	first, err := strconv.ParseUint(lo, 10, 16)
	last, err2 := strconv.ParseUint(hi, 10, 16)
	if err != nil || err2 != nil || first == 0 || last < first {
		return valueErr("PortRange", text, fmt.Errorf("%q is not a range of ports such as \"30000-30999\"", text))
	}
	r.Lo, r.Hi = uint16(first), uint16(last)
	return nil
}

// Config is the whole file. Defaults are what Default answers.
type Config struct {
	StateDir   string `toml:"state_dir"`
	RunDir     string `toml:"run_dir"`
	TenantsDir string `toml:"tenants_dir"`
	Socket     string `toml:"socket"`
	SocketGID  int    `toml:"socket_gid"`
	Log        struct {
		Format string `toml:"format"`
		Level  string `toml:"level"`
	} `toml:"log"`
	Containerd struct {
		Address   string `toml:"address"`
		Namespace string `toml:"namespace"`
		Runc      string `toml:"runc"`
		RuncRoot  string `toml:"runc_root"`
		Logger    string `toml:"logger"`
	} `toml:"containerd"`
	Cgroups struct {
		Root         string `toml:"root"`
		Slice        string `toml:"slice"`
		AllowPartial bool   `toml:"allow_partial"`
	} `toml:"cgroups"`
	Network struct {
		Pool4      netip.Prefix `toml:"pool4"`
		Pool6      netip.Prefix `toml:"pool6"`
		MTU        int          `toml:"mtu"`
		LinkPrefix string       `toml:"link_prefix"`
		NFTable    string       `toml:"nft_table"`

		PublishPorts   PortRange `toml:"publish_ports"`
		MaxConnections uint32    `toml:"max_connections"`
		NewConnections uint32    `toml:"new_connections_per_second"`
	} `toml:"network"`
	DNS struct {
		Upstreams        []string `toml:"upstreams"`
		CAFile           string   `toml:"ca_file"`
		Timeout          Duration `toml:"timeout"`
		Idle             Duration `toml:"idle"`
		TTLFloor         Duration `toml:"ttl_floor"`
		TTLCap           Duration `toml:"ttl_cap"`
		QueriesPerSecond int      `toml:"queries_per_second"`
		MaxAddresses     int      `toml:"max_addresses"`
	} `toml:"dns"`
	Egress struct {
		PinDir       string         `toml:"pin_dir"`
		HostNetworks []netip.Prefix `toml:"host_networks"`
		VerifyEvery  Duration       `toml:"verify_every"`
	} `toml:"egress"`
	Sandbox struct {
		Max           uint32   `toml:"max"`
		DefaultCPU    CPU      `toml:"default_cpus"`
		DefaultMemory Size     `toml:"default_memory"`
		DefaultPIDs   int64    `toml:"default_pids"`
		StopGrace     Duration `toml:"stop_grace"`
		KeepStopped   int      `toml:"keep_stopped"`
		LogMaxSize    Size     `toml:"log_max_size"`
		LogFiles      int      `toml:"log_files"`
	} `toml:"sandbox"`
	Node struct {
		ReserveCPU     CPU     `toml:"reserve_cpus"`
		ReserveMemory  Size    `toml:"reserve_memory"`
		CPUOvercommit  float64 `toml:"cpu_overcommit"`
		MaxSandboxPIDs int64   `toml:"max_pids"`
	} `toml:"node"`
	Usage struct {
		Interval   Duration `toml:"interval"`
		SpoolLimit Size     `toml:"spool_limit"`
		Gateway    string   `toml:"gateway"`
		CAFile     string   `toml:"ca_file"`
		CertFile   string   `toml:"cert_file"`
		KeyFile    string   `toml:"key_file"`
	} `toml:"usage"`
}

// Default answers the defaults.
func Default() Config {
	var c Config
	c.StateDir = "/var/lib/bulkhead"
	c.RunDir = "/run/bulkhead"
	c.TenantsDir = "/etc/bulkhead/tenants"
	c.Socket = "/run/bulkhead/agent.sock"
	c.Log.Format = "auto"
	c.Log.Level = "info"
	c.Containerd.Address = "/run/containerd/containerd.sock"
	c.Containerd.Namespace = "bulkhead"
	c.Containerd.Runc = "runc"
	c.Cgroups.Slice = "bulkhead.slice"
	c.Network.Pool4 = netip.MustParsePrefix("100.96.0.0/16")
	c.Network.Pool6 = netip.MustParsePrefix("fd62:6b68::/64")
	c.Network.MTU = 1500
	c.Network.LinkPrefix = "bh"
	c.Network.NFTable = "bulkhead"
	c.Network.MaxConnections = 4096
	c.Network.NewConnections = 1000
	c.DNS.Timeout = Duration{2 * time.Second}
	c.DNS.Idle = Duration{5 * time.Minute}
	c.DNS.TTLFloor = Duration{30 * time.Second}
	c.DNS.TTLCap = Duration{time.Hour}
	c.DNS.QueriesPerSecond = 50
	c.DNS.MaxAddresses = 1024
	c.Egress.PinDir = "/sys/fs/bpf/bulkhead"
	c.Egress.VerifyEvery = Duration{10 * time.Second}
	c.Sandbox.Max = 1024
	c.Sandbox.DefaultCPU = CPU{1000}
	c.Sandbox.DefaultMemory = Size{512 << 20}
	c.Sandbox.DefaultPIDs = 256
	c.Sandbox.StopGrace = Duration{10 * time.Second}
	c.Sandbox.KeepStopped = 100
	c.Sandbox.LogMaxSize = Size{10 << 20}
	c.Sandbox.LogFiles = 5
	c.Node.ReserveMemory = Size{1 << 30}
	c.Node.CPUOvercommit = 1
	c.Node.MaxSandboxPIDs = 4096
	c.Usage.Interval = Duration{10 * time.Second}
	c.Usage.SpoolLimit = Size{1 << 30}
	return c
}

// Load reads a file over the defaults. Relative paths in it are refused, so
// that what the agent does never depends on where it was started.
func Load(file string) (Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Config{}, err
	}
	return Parse(file, data)
}

// Parse is Load for data that is already there.
func Parse(file string, data []byte) (Config, error) {
	c := Default()
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return Config{}, locate(file, data, err)
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// valueError is a quantity that cannot be read. The decoder says nothing of
// where it stands, so locate looks for it.
type valueError struct {
	kind, text string
	err        error
}

func valueErr(kind string, text []byte, err error) error {
	if err == nil {
		return nil
	}
	return &valueError{kind: kind, text: string(text), err: err}
}

func (e *valueError) Error() string { return e.err.Error() }

// line finds the first key of the value's kind that has the value's text.
func (e *valueError) line(data []byte) (n int, key string) {
	kinds := map[string]string{}
	collect(reflect.TypeFor[Config](), "", func(key string, t reflect.Type) { kinds[key] = t.Name() })
	section := ""
	for line := range strings.Lines(string(data)) {
		n++
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[] ") + "."
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		k = section + strings.TrimSpace(k)
		if ok && kinds[k] == e.kind && strings.Contains(v, e.text) {
			return n, k
		}
	}
	return 0, ""
}

// locate adds file, line and, for an unknown key, the nearest name.
func locate(file string, data []byte, err error) error {
	var value *valueError
	if errors.As(err, &value) {
		if n, key := value.line(data); n > 0 {
			return fmt.Errorf("%s:%d: %s: %w", file, n, key, value.err)
		}
	}
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		e := strict.Errors[0]
		row, _ := e.Position()
		key := strings.Join(e.Key(), ".")
		return fmt.Errorf("%s:%d: unknown key %q; did you mean %q?", file, row, key, nearest(key, keys()))
	}
	var dec *toml.DecodeError
	if errors.As(err, &dec) {
		row, _ := dec.Position()
		return fmt.Errorf("%s:%d: %s", file, row, strings.TrimPrefix(dec.Error(), "toml: "))
	}
	return fmt.Errorf("%s: %w", file, err)
}

// collect calls f for every key of the file, dotted, sections included.
func collect(t reflect.Type, prefix string, f func(key string, t reflect.Type)) {
	for field := range t.Fields() {
		name := prefix + field.Tag.Get("toml")
		f(name, field.Type)
		if field.Type.Kind() == reflect.Struct && field.Type.Name() == "" {
			collect(field.Type, name+".", f)
		}
	}
}

func keys() []string {
	var out []string
	collect(reflect.TypeFor[Config](), "", func(key string, _ reflect.Type) { out = append(out, key) })
	return out
}

func nearest(key string, all []string) string {
	best, dist := "", 1<<30
	for _, k := range all {
		if d := levenshtein.Distance(key, k, nil); d < dist {
			best, dist = k, d
		}
	}
	return best
}

// check refuses values that cannot work, each with the key it stands at.
func (c *Config) check() error {
	for _, p := range []struct{ key, path string }{
		{"state_dir", c.StateDir}, {"run_dir", c.RunDir}, {"tenants_dir", c.TenantsDir}, {"socket", c.Socket},
		{"containerd.address", c.Containerd.Address}, {"egress.pin_dir", c.Egress.PinDir},
	} {
		if !filepath.IsAbs(p.path) {
			return fmt.Errorf("%s = %q is not an absolute path", p.key, p.path)
		}
	}
	if len(c.Socket) > 107 {
		return fmt.Errorf("socket has %d characters; a unix socket's path has at most 107", len(c.Socket))
	}
	if !c.Network.Pool4.IsValid() || !c.Network.Pool4.Addr().Is4() || c.Network.Pool4.Bits() > 30 {
		return fmt.Errorf("network.pool4 = %s is not an IPv4 prefix of /30 or wider", c.Network.Pool4)
	}
	if !c.Network.Pool6.IsValid() || !c.Network.Pool6.Addr().Is6() || c.Network.Pool6.Addr().Is4In6() || c.Network.Pool6.Bits() > 112 {
		return fmt.Errorf("network.pool6 = %s is not an IPv6 prefix of /112 or wider", c.Network.Pool6)
	}
	for _, l := range []struct {
		key  string
		nets []netip.Prefix
	}{
		{"network.pool4", []netip.Prefix{c.Network.Pool4}}, {"network.pool6", []netip.Prefix{c.Network.Pool6}},
		{"egress.host_networks", c.Egress.HostNetworks},
	} {
		for _, n := range l.nets {
			switch {
			case !n.IsValid() || n.Addr().Is4In6():
				return fmt.Errorf("%s: %s is not a network such as 192.0.2.0/24", l.key, n)
			case n != n.Masked():
				return fmt.Errorf("%s: %s has bits of a host; write %s", l.key, n, n.Masked())
			}
		}
	}
	for _, n := range []struct {
		key      string
		v        int64
		min, max int64
	}{
		{"network.mtu", int64(c.Network.MTU), 1280, 65535},
		{"network.max_connections", int64(c.Network.MaxConnections), 1, 1 << 24},
		{"network.new_connections_per_second", int64(c.Network.NewConnections), 1, 1_000_000},
		{"dns.timeout in ms", c.DNS.Timeout.Milliseconds(), 10, time.Minute.Milliseconds()},
		{"dns.idle in ms", c.DNS.Idle.Milliseconds(), 1000, (24 * time.Hour).Milliseconds()},
		{"dns.ttl_floor in ms", c.DNS.TTLFloor.Milliseconds(), 0, time.Hour.Milliseconds()},
		{"dns.ttl_cap in ms", c.DNS.TTLCap.Milliseconds(), max(1000, c.DNS.TTLFloor.Milliseconds()), (7 * 24 * time.Hour).Milliseconds()},
		{"dns.queries_per_second", int64(c.DNS.QueriesPerSecond), 1, 100_000},
		{"dns.max_addresses", int64(c.DNS.MaxAddresses), 1, 1024},
		{"sandbox.max", int64(c.Sandbox.Max), 1, min(4095, int64(1)<<(32-c.Network.Pool4.Bits())-2)},
		{"sandbox.default_pids", c.Sandbox.DefaultPIDs, 1, 1 << 22},
		{"sandbox.default_memory", c.Sandbox.DefaultMemory.Bytes, 4 << 20, 1 << 50},
		{"sandbox.default_cpus", c.Sandbox.DefaultCPU.Millis, 10, 1 << 20},
		{"sandbox.log_max_size", c.Sandbox.LogMaxSize.Bytes, 4 << 10, 1 << 40},
		{"sandbox.keep_stopped", int64(c.Sandbox.KeepStopped), 1, 100_000},
		{"sandbox.log_files", int64(c.Sandbox.LogFiles), 1, 100},
		{"node.max_pids", c.Node.MaxSandboxPIDs, 1, 1 << 22},
		{"node.reserve_memory", c.Node.ReserveMemory.Bytes, 0, 1 << 50},
		{"node.reserve_cpus", c.Node.ReserveCPU.Millis, 0, 1 << 20},
		{"usage.spool_limit", c.Usage.SpoolLimit.Bytes, 1 << 20, 1 << 50},
		{"usage.interval in ms", c.Usage.Interval.Milliseconds(), 100, time.Hour.Milliseconds()},
		{"egress.verify_every in ms", c.Egress.VerifyEvery.Milliseconds(), 100, time.Hour.Milliseconds()},
		{"sandbox.stop_grace in ms", c.Sandbox.StopGrace.Milliseconds(), 0, time.Hour.Milliseconds()},
	} {
		if n.v < n.min || n.v > n.max {
			return fmt.Errorf("%s = %d is not between %d and %d", n.key, n.v, n.min, n.max)
		}
	}
	if c.Node.CPUOvercommit < 1 || c.Node.CPUOvercommit > 100 {
		return fmt.Errorf("node.cpu_overcommit = %g is not between 1 and 100", c.Node.CPUOvercommit)
	}
	if l := c.Network.LinkPrefix; l == "" || len(l) > 3 {
		return fmt.Errorf("network.link_prefix = %q must have 1 to 3 characters (an interface name has 15, an id 12)", l)
	}
	switch c.Log.Format {
	case "auto", "json", "text":
	default:
		return fmt.Errorf("log.format = %q is not auto, json or text", c.Log.Format)
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log.level = %q is not debug, info, warn or error", c.Log.Level)
	}
	if f := c.DNS.CAFile; f != "" && !filepath.IsAbs(f) {
		return fmt.Errorf("dns.ca_file = %q is not an absolute path", f)
	}
	for _, u := range c.DNS.Upstreams {
		if err := checkUpstream(u); err != nil {
			return fmt.Errorf("dns.upstreams: %w", err)
		}
	}
	if (c.Usage.CertFile == "") != (c.Usage.KeyFile == "") {
		return errors.New("usage.cert_file and usage.key_file go together")
	}
	return nil
}

// checkUpstream refuses what is not the address of a resolver. A name would
// have to be resolved first.
func checkUpstream(u string) error {
	form := fmt.Errorf("%q: write an address and a port, \"192.0.2.53:53\", or \"tls://192.0.2.53:853#name\"", u)
	host, tls := strings.CutPrefix(u, "tls://")
	if tls {
		addr, name, ok := strings.Cut(host, "#")
		if !ok || name == "" {
			return form // without a name the certificate says nothing
		}
		host = addr
	}
	if a, err := netip.ParseAddrPort(host); err != nil || a.Port() == 0 {
		return form
	}
	return nil
}
