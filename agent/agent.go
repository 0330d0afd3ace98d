// SPDX-License-Identifier: Apache-2.0

// Package agent is the wiring of bulkhead-agent: Run opens what must survive,
// recovers, serves, and leaves. It alone sees every implementation; what
// decides and what does is in the packages below it.
//
// Order of opening: the store first, since its lock says that no other agent
// works here; then the tenants, for a wrong file must stop the agent before it
// has touched anything; then the machine. On the way out everything stays as
// it is: sandboxes run on, enforced and counted, and the next agent adopts
// them.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/api"
	"github.com/bulkheadhq/bulkhead/agent/budget"
	"github.com/bulkheadhq/bulkhead/agent/config"
	eventlog "github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/place"
	"github.com/bulkheadhq/bulkhead/agent/report"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/spool"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/cgroups"
	"github.com/bulkheadhq/bulkhead/netpol/dns"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
	"github.com/bulkheadhq/bulkhead/netpol/link"
	"github.com/bulkheadhq/bulkhead/runtime/containerd"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Options of Run.
type Options struct {
	Config  config.Config
	Version string
	Log     *slog.Logger
	Notify  func(state string)       // sd_notify; optional
	Fault   func(point string) error // tests break or kill at a named point; optional
}

// node is everything that is open.
type node struct {
	opts    Options
	cfg     config.Config
	started time.Time
	bootID  string
	nodeID  string
	cpus    int64 // thousandths
	memory  int64 // bytes

	store   *store.Store
	tenants *tenant.Set
	tree    *cgroups.Tree
	links   *link.Manager
	egress  *enforce.Enforcer
	budgets *budget.Keeper
	names   *dns.Server // nil if there is no resolver to ask
	flows   *eventlog.Hub
	spool   *spool.Spool
	runtime *containerd.Runtime
	report  *report.Reporter
	sup     *supervisor.Supervisor

	upstreams []string // that names are asked of

	reloading sync.Mutex // one reading of the tenants at a time, so that the last one read is the last in force
}

// Run opens, recovers, serves and blocks until ctx ends or something that the
// agent cannot do without fails.
func Run(ctx context.Context, opts Options) (err error) {
	n := &node{opts: opts, cfg: opts.Config, started: time.Now()}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := n.open(); err != nil {
		return err
	}
	l, err := listen(n.cfg.Socket, n.cfg.SocketGID)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	ready := make(chan struct{})
	group.Go(func() error { return n.sup.Run(ctx, ready) })
	group.Go(func() error {
		return link.WatchHostAddrs(ctx, func(addrs []netip.Prefix) {
			warning := ""
			if err := n.egress.SetHostAddrs(addrs); err != nil {
				opts.Log.Error("put the host's addresses into the hard denies", "err", err)
				warning = fmt.Sprintf("a new address of this host is not among the hard denies, only the second layer keeps sandboxes from it: %v", err)
			}
			n.sup.Warn("host addresses", warning)
		})
	})
	n.runNetwork(ctx, group)
	if n.report != nil {
		group.Go(func() error { return n.report.Run(ctx) })
	}
	group.Go(func() error { n.reloadOnHup(ctx); return nil })
	select {
	case <-ready:
		group.Go(func() error { return api.Serve(ctx, n.apiConfig(), l) })
		opts.Log.Info("agent ready", "node", n.nodeID, "socket", n.cfg.Socket, "version", opts.Version)
		n.notify("READY=1")
		<-ctx.Done()
	case <-ctx.Done():
		l.Close() // nobody was served yet
	}
	n.notify("STOPPING=1")
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

func (n *node) notify(state string) {
	if n.opts.Notify != nil {
		n.opts.Notify(state)
	}
}

func (n *node) open() (err error) {
	c := n.cfg
	if os.Geteuid() != 0 {
		return errors.New("the agent needs root: it makes namespaces, cgroups and BPF programs (systemctl start bulkhead-agent, or sudo)")
	}
	for _, dir := range []string{c.StateDir, filepath.Join(c.StateDir, "logs"), filepath.Join(c.StateDir, "etc"), c.RunDir, filepath.Join(c.RunDir, "netns"), filepath.Dir(c.Socket)} {
		mode := fs.FileMode(0o700)
		if dir == c.RunDir || dir == filepath.Dir(c.Socket) {
			mode = 0o755
		}
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	if n.store, err = store.Open(filepath.Join(c.StateDir, "bulkhead.db")); err != nil {
		return err
	}
	n.nodeID = n.store.NodeID()
	if n.tenants, err = tenant.Load(c.TenantsDir); err != nil {
		return err
	}
	if err := n.measure(); err != nil {
		return err
	}
	if n.tree, err = cgroups.Open(cgroups.Config{Root: c.Cgroups.Root, Slice: c.Cgroups.Slice, AllowPartial: c.Cgroups.AllowPartial}); err != nil {
		return err
	}
	n.links, err = link.Open(link.Config{
		Pool4: c.Network.Pool4, Pool6: c.Network.Pool6, NetnsDir: filepath.Join(c.RunDir, "netns"),
		Table: c.Network.NFTable, LinkPrefix: c.Network.LinkPrefix,
		MaxConnections: c.Network.MaxConnections, NewConnectionsPerSecond: c.Network.NewConnections,
	})
	if err != nil {
		return err
	}
	n.egress, err = enforce.Open(enforce.Config{
		PinDir: c.Egress.PinDir, MaxSandboxes: 4096,
		Pools: []netip.Prefix{c.Network.Pool4, c.Network.Pool6}, HardDeny: c.Egress.HostNetworks,
	})
	if err != nil {
		return err
	}
	addrs, err := link.HostAddrs()
	if err != nil {
		return err
	}
	if err := n.egress.SetHostAddrs(addrs); err != nil {
		return err
	}
	if err := n.openNetwork(); err != nil {
		return err
	}
	if n.spool, err = spool.Open(spool.Config{Dir: filepath.Join(c.StateDir, "spool"), LimitBytes: c.Usage.SpoolLimit.Bytes, NodeID: n.nodeID}); err != nil {
		return err
	}
	if c.Usage.Gateway != "" {
		if n.report, err = report.New(report.Config{
			Target: c.Usage.Gateway, CAFile: c.Usage.CAFile, CertFile: c.Usage.CertFile, KeyFile: c.Usage.KeyFile,
			NodeID: n.nodeID, Log: n.opts.Log,
		}, n.spool); err != nil {
			return err
		}
	}
	runcRoot := c.Containerd.RuncRoot
	if runcRoot == "" {
		runcRoot = filepath.Join(c.RunDir, "runc")
	}
	if n.runtime, err = containerd.Open(containerd.Config{
		Address: c.Containerd.Address, Namespace: c.Containerd.Namespace, Dir: filepath.Join(c.RunDir, "fifo"),
		Runc: c.Containerd.Runc, RuncRoot: runcRoot, Logger: loggerPath(c.Containerd.Logger), Log: n.opts.Log,
	}); err != nil {
		return err
	}
	n.sup, err = n.newSupervisor()
	return err
}

// measure reads what the node has.
func (n *node) measure() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read boot id: %w", err)
	}
	n.bootID = strings.TrimSpace(string(boot))
	n.cpus = int64(runtime.NumCPU()) * 1000
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("read memory size: %w", err)
	}
	n.memory = int64(info.Totalram) * int64(info.Unit)
	return nil
}

// loggerPath is bulkhead-log beside our own executable, unless configured.
func loggerPath(configured string) string {
	if configured != "" {
		return configured
	}
	self, err := os.Executable()
	if err != nil {
		return "bulkhead-log"
	}
	return filepath.Join(filepath.Dir(self), "bulkhead-log")
}

// etcFiles writes what every sandbox sees as /etc/resolv.conf and /etc/hosts.
func (n *node) etcFiles() (resolv, hosts string, err error) {
	resolv, hosts = filepath.Join(n.cfg.StateDir, "etc", "resolv.conf"), filepath.Join(n.cfg.StateDir, "etc", "hosts")
	for file, text := range map[string]string{
		resolv: n.resolvConf(),
		hosts:  "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
	} {
		// Running sandboxes have the file bound: it is not written without need.
		if have, err := os.ReadFile(file); err == nil && string(have) == text {
			continue
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return "", "", fmt.Errorf("write what sandboxes see in /etc: %w", err)
		}
	}
	return resolv, hosts, nil
}

func (n *node) newSupervisor() (*supervisor.Supervisor, error) {
	c := n.cfg
	resolv, hosts, err := n.etcFiles()
	if err != nil {
		return nil, err
	}
	reserveCPU, reserveMemory := c.Node.ReserveCPU.Millis, c.Node.ReserveMemory.Bytes
	if reserveCPU >= n.cpus || reserveMemory >= n.memory {
		return nil, fmt.Errorf("node.reserve_cpus and node.reserve_memory leave nothing for sandboxes: this node has %d thousandths of a core and %d bytes", n.cpus, n.memory)
	}
	var resolves supervisor.Names
	if n.names != nil {
		resolves = names{n.names}
	}
	return supervisor.New(supervisor.Config{
		Log: n.opts.Log,
		Place: place.Node{
			Pool4: c.Network.Pool4, Pool6: c.Network.Pool6, MTU: c.Network.MTU, LogRoot: filepath.Join(c.StateDir, "logs"),
			Addr: link.AddrFor, MAC: link.MACFor, HostLink: n.links.HostName, Netns: n.links.NetnsPath, Cgroup: n.tree.LeafPath,
		},
		Defaults: sandbox.Limits{CPUMillis: c.Sandbox.DefaultCPU.Millis, MemoryBytes: c.Sandbox.DefaultMemory.Bytes, PIDs: c.Sandbox.DefaultPIDs},
		Biggest:  sandbox.Limits{CPUMillis: n.cpus, MemoryBytes: n.memory - reserveMemory, PIDs: c.Node.MaxSandboxPIDs},
		Capacity: tenant.Quota{
			CPUMillis:   int64(float64(n.cpus-reserveCPU) * c.Node.CPUOvercommit),
			MemoryBytes: n.memory - reserveMemory, Sandboxes: int64(c.Sandbox.Max),
		},
		PublishPorts: admit.Ports{Lo: c.Network.PublishPorts.Lo, Hi: c.Network.PublishPorts.Hi},
		HostListens:  hostListens,
		MaxSlot:      c.Sandbox.Max, KeepStopped: c.Sandbox.KeepStopped, LogMaxBytes: c.Sandbox.LogMaxSize.Bytes, LogFiles: c.Sandbox.LogFiles,
		ResolvConf: resolv, Hosts: hosts, Partial: c.Cgroups.AllowPartial, NotEnforced: n.tree.NotEnforced(),
		Interval: c.Usage.Interval.Duration, VerifyEvery: c.Egress.VerifyEvery.Duration, Grace: c.Sandbox.StopGrace.Duration,
		BootID: n.bootID, Source: "node/" + n.nodeID + "/boot/" + n.bootID,
		SpoolFull: n.spoolFull, Tenants: n.tenants,
		Store: n.store, Links: links{n.links}, Names: resolves, Budgets: n.budgets, Egress: egress{n.egress}, Cgroups: tree{n.tree}, Runtime: n.runtime, Spool: n.spool,
		RemoveLog:    func(id string) error { return os.RemoveAll(n.logDir(id)) },
		BootTime:     bootTime,
		Fault:        n.opts.Fault,
		LingerRemove: 2 * time.Second,
	})
}

// bootTime is CLOCK_BOOTTIME: it counts suspend and no one can set it.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

func (n *node) logDir(id string) string { return filepath.Join(n.cfg.StateDir, "logs", id) }

// spoolFull says why usage cannot be recorded now, or nothing.
func (n *node) spoolFull() string {
	st := n.spool.Status()
	if st.Err != nil {
		return "the usage spool cannot be written: " + st.Err.Error()
	}
	if !st.Full {
		return n.diskFull()
	}
	why := "no gateway is configured"
	if n.report != nil {
		r := n.report.Status()
		why = fmt.Sprintf("gateway %s is %s", n.cfg.Usage.Gateway, r.State)
		if r.LastError != "" {
			why += ": " + r.LastError
		}
	}
	return fmt.Sprintf("the usage spool holds %d of %d bytes (%s)", st.Bytes, st.Limit, why)
}

// minFree is how much of the state directory's disk must be free for a sandbox
// to start: room for records, and for the usage of what runs until somebody has
// made more.
const minFree = 4 << 20

// diskFull says why the disk takes no new sandbox's usage, or nothing. To wait
// for a write to fail would be too late: the sandbox would run by then.
func (n *node) diskFull() string {
	var st unix.Statfs_t
	if err := unix.Statfs(n.cfg.StateDir, &st); err != nil {
		return fmt.Sprintf("read free space of %s: %v", n.cfg.StateDir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < minFree {
		return fmt.Sprintf("no space left on device: %d bytes are free in %s, %d must be", free, n.cfg.StateDir, minFree)
	}
	if st.Files > 0 && st.Ffree == 0 {
		return fmt.Sprintf("no space left on device: no inode is free in %s", n.cfg.StateDir)
	}
	return ""
}

// reload reads the tenants directory again and puts it in force.
func (n *node) reload(ctx context.Context) (tenants, updated int, err error) {
	n.reloading.Lock()
	defer n.reloading.Unlock()
	set, err := tenant.Load(n.cfg.TenantsDir)
	if err != nil {
		return 0, 0, err
	}
	updated, err = n.sup.Reload(ctx, set)
	return len(set.All()), updated, err
}

func (n *node) reloadOnHup(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-hup:
			tenants, updated, err := n.reload(ctx)
			if err != nil {
				n.opts.Log.Error("reload refused", "err", err)
				continue
			}
			n.opts.Log.Info("reloaded", "tenants", tenants, "sandboxes_updated", updated)
		case <-ctx.Done():
			return
		}
	}
}

// listen makes the socket. A socket that nobody answers on is left over from a
// crash and replaced; the store's lock has already said that no agent of this
// state directory runs.
func listen(path string, gid int) (net.Listener, error) {
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("socket %s: another process answers on it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	old := unix.Umask(0o117) // born with the right mode: there is no moment at which others could connect
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chown(path, 0, gid); err != nil {
		l.Close()
		return nil, fmt.Errorf("give socket to group %d: %w", gid, err)
	}
	return l, nil
}

// close lets go of everything and changes nothing on the machine.
func (n *node) close() error {
	var errs []error
	if n.runtime != nil {
		errs = append(errs, n.runtime.Close())
	}
	if n.spool != nil {
		errs = append(errs, n.spool.Close())
	}
	if n.names != nil {
		errs = append(errs, n.names.Close())
	}
	if n.egress != nil {
		errs = append(errs, n.egress.Close())
	}
	if n.links != nil {
		errs = append(errs, n.links.Close())
	}
	if n.tree != nil {
		errs = append(errs, n.tree.Close())
	}
	if n.store != nil {
		errs = append(errs, n.store.Close())
	}
	return errors.Join(errs...)
}

// CheckTenants reads the tenants that cfg names and answers what is wrong with
// them; it changes nothing.
func CheckTenants(cfg config.Config) error {
	_, err := tenant.Load(cfg.TenantsDir)
	return err
}
