// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// specFlags are the flags of run that become the Spec.
type specFlags struct {
	name, tenant, policy, workdir, user string
	workload, runtime, envFile          string
	cpus, memory, ttl                   string
	pids                                int64
	env, labels, publish                []string
	stdin, tty, rm                      bool
}

func (s *specFlags) add(f *pflag.FlagSet) {
	f.StringVar(&s.name, "name", "", "name, unique within the tenant (default: made from the id)")
	f.StringVar(&s.tenant, "tenant", os.Getenv("BULKHEAD_TENANT"), "whose sandbox it is, as in acme/vision ($BULKHEAD_TENANT)")
	f.StringVar(&s.cpus, "cpus", "", "cores, as in 0.5, 2 or 500m (default: the node's)")
	f.StringVarP(&s.memory, "memory", "m", "", "memory, as in 256MiB (default: the node's); swap is always off")
	f.Int64Var(&s.pids, "pids", 0, "most processes and threads at once (default: the node's)")
	f.StringVar(&s.policy, "policy", "", "file with an EgressPolicy to add below the tenant's own")
	f.StringArrayVarP(&s.publish, "publish", "p", nil, "HOSTPORT:PORT[/tcp|udp]: connections to the node's port go to the sandbox's; may be repeated")
	f.StringVar(&s.ttl, "ttl", "", "lifetime, as in 1h; the sandbox is killed at its end")
	f.StringArrayVarP(&s.env, "env", "e", nil, "KEY=value, or KEY to pass it on from here; may be repeated")
	f.StringVar(&s.envFile, "env-file", "", "file with a KEY=value on each line")
	f.StringVarP(&s.workdir, "workdir", "w", "", "directory that the command starts in")
	f.StringVarP(&s.user, "user", "u", "", "user or uid[:gid] that the command runs as")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "KEY=value; may be repeated")
	f.StringVar(&s.workload, "workload", "", "text of yours that is copied to every usage record")
	f.StringVar(&s.runtime, "runtime", "", "runtime class of the node")
	f.BoolVarP(&s.stdin, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&s.tty, "tty", "t", false, "give the command a terminal")
	f.BoolVar(&s.rm, "rm", false, "delete the sandbox and its log once it has stopped")
}

// spec checks the flags as far as that needs no node.
func (s *specFlags) spec(image string, command []string) (*sandboxv1.Spec, error) {
	spec := &sandboxv1.Spec{Name: s.name, Tenant: s.tenant, Image: image, Command: command, Workdir: s.workdir,
		User: s.user, WorkloadRef: s.workload, RuntimeClass: s.runtime, Terminal: s.tty, Stdin: s.stdin,
		Limits: &sandboxv1.Limits{Pids: s.pids}}
	if s.tenant == "" {
		return nil, usagef("whose sandbox? Give --tenant or set BULKHEAD_TENANT (bulkhead tenant ls shows the tenants)")
	}
	if _, err := tenant.ParsePath(s.tenant); err != nil {
		return nil, usagef("--tenant: %v", err)
	}
	if image == "" {
		return nil, usagef("the image is empty (bulkhead image ls shows the images)")
	}
	var err error
	if s.cpus != "" {
		if spec.Limits.CpuMillis, err = tenant.ParseCPU(s.cpus); err != nil {
			return nil, usagef("--cpus: %v", err)
		}
		if spec.Limits.CpuMillis == 0 {
			return nil, usagef("--cpus: %s is no limit: leave the flag out for the node's own", s.cpus)
		}
	}
	if s.memory != "" {
		if spec.Limits.MemoryBytes, err = tenant.ParseSize(s.memory); err != nil {
			return nil, usagef("--memory: %v", err)
		}
		if spec.Limits.MemoryBytes == 0 {
			return nil, usagef("--memory: %s is no limit: leave the flag out for the node's own", s.memory)
		}
	}
	if s.pids < 0 {
		return nil, usagef("--pids: %d is negative", s.pids)
	}
	if s.ttl != "" {
		ttl, err := parseDuration(s.ttl)
		if err != nil {
			return nil, usagef("--ttl: %v", err)
		}
		if ttl < time.Millisecond {
			return nil, usagef("--ttl: %s is no lifetime", s.ttl)
		}
		spec.TtlMs = ttl.Milliseconds()
	}
	if spec.Env, err = s.environment(); err != nil {
		return nil, err
	}
	if spec.Labels, err = keyValues("--label", s.labels); err != nil {
		return nil, err
	}
	if spec.Publish, err = publishedPorts(s.publish); err != nil {
		return nil, err
	}
	if s.policy != "" {
		text, err := os.ReadFile(s.policy)
		if err != nil {
			return nil, usagef("--policy: %v", err)
		}
		spec.Policy = string(text)
	}
	return spec, nil
}

// afterDashes drops the -- that many write between a name and a command.
func afterDashes(command []string) []string {
	if len(command) > 0 && command[0] == "--" {
		return command[1:]
	}
	return command
}

// environment is the file's lines, then the flags.
func (s *specFlags) environment() ([]string, error) {
	var out []string
	if s.envFile != "" {
		data, err := os.ReadFile(s.envFile)
		if err != nil {
			return nil, usagef("--env-file: %v", err)
		}
		sc := bufio.NewScanner(bytes.NewReader(data))
		sc.Buffer(nil, len(data)+1)
		for n := 1; sc.Scan(); n++ {
			line := strings.TrimSuffix(sc.Text(), "\r")
			if t := strings.TrimSpace(line); t == "" || t[0] == '#' {
				continue
			}
			if k, _, ok := strings.Cut(line, "="); !ok || k == "" {
				return nil, usagef("--env-file: %s:%d: not KEY=value", s.envFile, n)
			}
			out = append(out, line)
		}
	}
	more, err := resolveEnv(s.env)
	out = append(out, more...)
	if s.tty && !hasKey(out, "TERM") && os.Getenv("TERM") != "" {
		out = append(out, "TERM="+os.Getenv("TERM"))
	}
	return out, err
}

// resolveEnv fills KEY alone from this process's own environment, so that a
// credential need not stand in a command line.
func resolveEnv(env []string) ([]string, error) {
	var out []string
	for _, kv := range env {
		k, _, ok := strings.Cut(kv, "=")
		if k == "" {
			return nil, usagef("--env: %q is not KEY=value", kv)
		}
		if !ok {
			v, set := os.LookupEnv(k)
			if !set {
				return nil, usagef("--env: %s is not set here; write %s=value", k, k)
			}
			kv = k + "=" + v
		}
		out = append(out, kv)
	}
	return out, nil
}

func hasKey(env []string, key string) bool {
	for _, kv := range env {
		if strings.HasPrefix(kv, key+"=") {
			return true
		}
	}
	return false
}

func keyValues(flag string, kvs []string) (map[string]string, error) {
	var out map[string]string
	for _, kv := range kvs {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, usagef("%s: %q is not KEY=value", flag, kv)
		}
		if _, twice := out[k]; twice {
			return nil, usagef("%s: %s is given twice", flag, k)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out, nil
}

// publishedPorts reads 8080:80, 8080:80/tcp, 5353:53/udp.
func publishedPorts(ports []string) ([]*sandboxv1.PublishedPort, error) {
	var out []*sandboxv1.PublishedPort
	for _, p := range ports {
		pair, proto, _ := strings.Cut(p, "/")
		host, inside, ok := strings.Cut(pair, ":")
		if !ok {
			return nil, usagef("--publish: %q is not HOSTPORT:PORT, as in 8080:80 or 5353:53/udp", p)
		}
		switch proto = strings.ToLower(proto); proto {
		case "":
			proto = "tcp"
		case "tcp", "udp":
		default:
			return nil, usagef("--publish: %q: there are tcp and udp, not %q", p, proto)
		}
		port := &sandboxv1.PublishedPort{Protocol: proto}
		for _, x := range []struct {
			text string
			to   *uint32
		}{{host, &port.Host}, {inside, &port.Port}} {
			n, err := strconv.ParseUint(x.text, 10, 16)
			if err != nil || n == 0 {
				return nil, usagef("--publish: %q: %q is no port; ports are 1 to 65535", p, x.text)
			}
			*x.to = uint32(n)
		}
		out = append(out, port)
	}
	return out, nil
}

// parseDuration reads 90s, 10m, 1h30m, and helps those who write otherwise.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err == nil && d >= 0:
		return d, nil
	case err == nil:
		return 0, fmt.Errorf("%s is negative", s)
	}
	if _, err := strconv.ParseUint(s, 10, 32); err == nil {
		return 0, fmt.Errorf("%q has no unit (did you mean %ss?)", s, s)
	}
	if n, err := strconv.ParseUint(strings.TrimSuffix(s, "d"), 10, 16); err == nil {
		return 0, fmt.Errorf("%q: days are not a unit (did you mean %dh?)", s, n*24)
	}
	return 0, fmt.Errorf("%q is no length of time; write it as in 90s, 10m or 1h30m", s)
}

// open opens a file named in an argument; "-" is standard input.
func (c *cli) open(name string) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(c.stdin), nil
	}
	return os.Open(name)
}
