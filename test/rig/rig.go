// SPDX-License-Identifier: Apache-2.0

// Package rig runs the whole of Bulkhead for tests, the demo and benchmarks: a
// private containerd, a gateway and an agent as real processes of their own,
// and an internet of our own made of network namespaces.
//
// One rig at a time runs on a machine; others wait for it. Everything it makes
// carries names that no operator's agent uses (links bt*, table bulkhead-test,
// slice bulkhead-test.slice), is below one temporary directory, and is gone
// after Close, also after a failure. What a killed run left behind is removed
// by the next Open.
package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/containerdtest"
)

// Names that are the rig's own.
const (
	LinkPrefix = "bt"
	NFTable    = "bulkhead-test"
	Slice      = "bulkhead-test.slice"
	Pool4      = "100.127.0.0/20"
	Pool6      = "fd62:6b68:7e57::/64"
)

const lockFile = "/run/bulkhead-test.lock"

// Config of a rig. The zero value is a good one.
type Config struct {
	Tenants   string // directory that is copied; empty: deploy/examples/tenants
	Extra     string // more lines of TOML for the agent, at its end
	Network   string // more lines of its [network]
	Interval  string // between usage samples; empty: "1s"
	Agent     string // path of the agent's program; empty: bulkhead-agent of Bin
	NoGateway bool
	NoNet     bool      // make no internet
	Images    []string  // archives to import; empty: busybox
	Progress  io.Writer // one line per stage; nil: none
}

// Rig is what runs. Its methods are for one goroutine.
type Rig struct {
	Dir        string // state, sockets, configuration, logs
	Bin        string
	Repo       string
	Socket     string // of the agent
	Gateway    string // address of the gateway: unix://...
	TenantsDir string
	Containerd *containerdtest.Daemon
	Net        *Internet
	NotUnified bool // the host has no unified cgroup v2: some limits are not enforced

	cfg     Config
	lock    *os.File
	sysctls map[string][]byte // as they were before the agent
	agent   *process
	gateway *process
}

// process is a daemon of ours, its output in a file.
type process struct {
	name string
	cmd  *exec.Cmd
	dead chan struct{} // closed by the waiter
	err  error         // valid once dead is closed
	log  string
}

// Open starts everything and waits until it answers.
func Open(cfg Config) (*Rig, error) {
	if cfg.Interval == "" {
		cfg.Interval = "1s"
	}
	r := &Rig{cfg: cfg}
	if err := r.open(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Rig) open() (err error) {
	if r.Bin, err = containerdtest.BinDir(); err != nil {
		return err
	}
	if r.Repo, err = containerdtest.RepoRoot(); err != nil {
		r.Repo = os.Getenv("BULKHEAD_REPO") // test binaries that run elsewhere
	}
	if r.lock, err = os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(r.lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lockFile, err)
	}
	if err := sweep(); err != nil {
		return err
	}
	r.sysctls = map[string][]byte{}
	for _, file := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if r.sysctls[file], err = os.ReadFile(file); err != nil {
			return err
		}
	}
	if r.Dir, err = os.MkdirTemp("", dirPrefix); err != nil {
		return err
	}
	r.Socket = filepath.Join(r.Dir, "agent.sock")
	r.TenantsDir = filepath.Join(r.Dir, "tenants")
	src := r.cfg.Tenants
	if src == "" {
		src = filepath.Join(r.Repo, "deploy/examples/tenants")
	}
	if err := os.CopyFS(r.TenantsDir, os.DirFS(src)); err != nil {
		return err
	}
	if !r.cfg.NoNet {
		r.say("internet of %d hosts in network namespaces", len(hosts))
		if r.Net, err = openInternet(); err != nil {
			return err
		}
	}
	r.say("private containerd")
	if r.Containerd, err = containerdtest.Open(containerdtest.Config{}); err != nil {
		return err
	}
	if !r.cfg.NoGateway {
		r.say("gateway")
		if err := r.StartGateway(); err != nil {
			return err
		}
	}
	r.say("agent")
	if err := r.StartAgent(); err != nil {
		return err
	}
	images := r.cfg.Images
	if images == nil {
		images = []string{filepath.Join(r.Repo, "build/images/busybox.tar")}
	}
	for _, img := range images {
		r.say("image %s", filepath.Base(img))
		if out, err := r.CLI("image", "import", img); err != nil {
			return fmt.Errorf("import %s: %w: %s", img, err, out)
		}
	}
	return nil
}

func (r *Rig) say(format string, args ...any) {
	if r.cfg.Progress != nil {
		fmt.Fprintf(r.cfg.Progress, "  starting "+format+"\n", args...)
	}
}

// AgentConfig writes the agent's configuration and answers its path.
func (r *Rig) AgentConfig() (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return "", err
	}
	r.NotUnified = st.Type != unix.CGROUP2_SUPER_MAGIC
	gateway, upstream := r.Gateway, ""
	if r.Net != nil {
		upstream = fmt.Sprintf("[dns]\nupstreams = [%q]\n", Resolver)
	}
	text := fmt.Sprintf(`state_dir = %[1]q
run_dir = %[2]q
tenants_dir = %[3]q
socket = %[4]q
[containerd]
address = %[5]q
runc = %[6]q
runc_root = %[7]q
logger = %[8]q
[cgroups]
slice = %[9]q
allow_partial = %[10]t
[network]
pool4 = %[11]q
pool6 = %[12]q
link_prefix = %[13]q
nft_table = %[14]q
%[20]s%[19]s[egress]
pin_dir = %[15]q
verify_every = "2s"
[node]
cpu_overcommit = 64.0
[usage]
interval = %[16]q
gateway = %[17]q
%[18]s
`, filepath.Join(r.Dir, "state"), filepath.Join(r.Dir, "run"), r.TenantsDir, r.Socket,
		r.Containerd.Address, filepath.Join(r.Bin, "runc"), r.Containerd.RuncRoot, filepath.Join(r.Bin, "bulkhead-log"),
		Slice, r.NotUnified, Pool4, Pool6, LinkPrefix, NFTable, r.pinDir(), r.cfg.Interval, gateway, r.cfg.Extra, upstream, r.cfg.Network)
	path := filepath.Join(r.Dir, "bulkhead-agent.toml")
	return path, os.WriteFile(path, []byte(text), 0o600)
}

func (r *Rig) pinDir() string { return filepath.Join(r.Dir, "bpf") }

// StartGateway starts the gateway, also again.
func (r *Rig) StartGateway() (err error) {
	sock := filepath.Join(r.Dir, "gateway.sock")
	r.Gateway = "unix://" + sock
	conf := filepath.Join(r.Dir, "bulkhead-gateway.toml")
	text := fmt.Sprintf("data_dir = %q\nlisten = [%q]\n", filepath.Join(r.Dir, "gateway"), r.Gateway)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	if r.gateway, err = r.start("bulkhead-gateway", filepath.Join(r.Bin, "bulkhead-gateway"), nil, "--config", conf); err != nil {
		return err
	}
	return r.gateway.await(sock, 30*time.Second)
}

// KillGateway ends the gateway with KILL.
func (r *Rig) KillGateway() error { return r.gateway.end(syscall.SIGKILL) }

// Reconfigure changes what the next StartAgent goes by.
func (r *Rig) Reconfigure(change func(*Config)) { change(&r.cfg) }

// StartAgent starts the agent, also again. env are additions.
func (r *Rig) StartAgent(env ...string) error {
	conf, err := r.AgentConfig()
	if err != nil {
		return err
	}
	program := r.cfg.Agent
	if program == "" {
		program = filepath.Join(r.Bin, "bulkhead-agent")
	}
	if r.agent, err = r.start("bulkhead-agent", program, env, "--config", conf); err != nil {
		return err
	}
	return r.agent.await(r.Socket, 60*time.Second)
}

// AgentPID of the running agent.
func (r *Rig) AgentPID() int { return r.agent.cmd.Process.Pid }

// KillAgent ends the agent with KILL, as a crash would.
func (r *Rig) KillAgent() error { return r.agent.end(syscall.SIGKILL) }

// StopAgent asks the agent to leave, as systemd would.
func (r *Rig) StopAgent() error { return r.agent.end(syscall.SIGTERM) }

// AgentDead is closed when the agent has ended; by itself it never should.
func (r *Rig) AgentDead() <-chan struct{} { return r.agent.dead }

// AgentLog answers the last part of the agent's log.
func (r *Rig) AgentLog() string { return tail(filepath.Join(r.Dir, "bulkhead-agent.log")) }

// GatewayLog answers the last part of the gateway's log.
func (r *Rig) GatewayLog() string { return tail(filepath.Join(r.Dir, "bulkhead-gateway.log")) }

func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-16<<10):])
}

func (r *Rig) start(name, program string, env []string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(r.Dir, name+".log"), dead: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(program, args...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), env...)
	// Its own process group: a ^C at the terminal is ours to handle.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.dead)
	}()
	return p, nil
}

// await waits until a unix socket answers.
func (p *process) await(sock string, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for time.Now().Before(deadline) {
		select {
		case <-p.dead:
			return fmt.Errorf("%s ended: %w: %s", p.name, p.err, strings.TrimSpace(tail(p.log)))
		default:
		}
		if c, err := net.Dial("unix", sock); err == nil {
			return c.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s does not answer on %s after %s: %s", p.name, sock, limit, tail(p.log))
}

func (p *process) end(sig syscall.Signal) error {
	if p == nil {
		return nil
	}
	select {
	case <-p.dead:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.dead:
		return nil
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.dead
		return fmt.Errorf("%s did not end on %s within 20s and was killed", p.name, sig)
	}
}

// Command makes a CLI command of this rig's agent.
func (r *Rig) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(r.Bin, "bulkhead"), args...)
	cmd.Env = append(os.Environ(), "BULKHEAD_SOCKET="+r.Socket, "BULKHEAD_GATEWAY="+r.Gateway)
	return cmd
}

// CLI runs a CLI command and answers stdout and stderr together, trimmed.
func (r *Rig) CLI(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := r.Command(ctx, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

// ExitCode of a CLI error; -1 if it is not one.
func ExitCode(err error) int {
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.ExitCode()
	}
	return -1
}

// Close ends everything and removes what there is. It is safe after a failed
// Open and may be called twice.
func (r *Rig) Close() error {
	var errs []error
	if r.agent != nil {
		if out, err := r.stopAll(); err != nil {
			errs = append(errs, fmt.Errorf("stop sandboxes: %w: %s", err, out))
		}
		errs = append(errs, r.agent.end(syscall.SIGTERM))
		r.agent = nil
	}
	errs = append(errs, r.gateway.end(syscall.SIGTERM))
	r.gateway = nil
	if r.Containerd != nil {
		errs = append(errs, r.Containerd.Close())
		r.Containerd = nil
	}
	if r.Net != nil {
		errs = append(errs, r.Net.Close())
		r.Net = nil
	}
	for file, was := range r.sysctls {
		errs = append(errs, os.WriteFile(file, was, 0o644))
	}
	r.sysctls = nil
	if r.lock != nil {
		errs = append(errs, sweep(), r.lock.Close())
		r.lock = nil
	}
	return errors.Join(errs...)
}

// stopAll removes every sandbox through the agent, if it answers.
func (r *Rig) stopAll() (string, error) {
	select {
	case <-r.agent.dead:
		return "", nil
	default:
	}
	out, err := r.CLI("ls", "-a", "-q")
	if err != nil {
		return out, err
	}
	ids := strings.Fields(out)
	if len(ids) == 0 {
		return "", nil
	}
	return r.CLI(append([]string{"rm", "-f"}, ids...)...)
}
