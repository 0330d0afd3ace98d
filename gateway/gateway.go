// SPDX-License-Identifier: Apache-2.0

// Package gateway wires the usage ledger, the services that feed and read it,
// and the sockets they are reached on.
//
// It owns no state: the ledger does, and everything in it survives a crash at
// any point. Run opens the ledger first, so that a second gateway on one
// directory ends before it touches a socket, and closes it last.
//
// The gateway enforces nothing on nodes and never calls them.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/ingest"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
	"github.com/bulkheadhq/bulkhead/gateway/query"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// stopGrace is how long calls under way have when the gateway stops.
const stopGrace = 5 * time.Second

// Run serves until ctx is done, which is no error, or something fails.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	return run(ctx, cfg, log, nil)
}

// run is Run; fault is the ledger's, for tests.
func run(ctx context.Context, cfg config.Config, log *slog.Logger, fault func(string) error) (err error) {
	if err := makeDir(cfg.DataDir); err != nil {
		return err
	}
	l, err := ledger.Open(ledger.Config{Dir: cfg.DataDir, Fault: fault})
	if err != nil {
		return err
	}
	defer func() {
		if cerr := l.Close(); err == nil {
			err = cerr
		}
	}()

	listeners, err := listenAll(cfg.Listen)
	if err != nil {
		return err
	}
	defer closeAll(listeners) // those that Serve has not closed
	servers, err := newServers(cfg, l, log)
	if err != nil {
		return err
	}

	g, gctx := errgroup.WithContext(ctx)
	for i, lis := range listeners {
		server := servers.of(cfg.Listen[i])
		g.Go(func() error {
			// Stopped already if ctx was done before it could serve.
			if err := server.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				return fmt.Errorf("serve %s: %w", cfg.Listen[i], err)
			}
			return nil
		})
	}
	g.Go(func() error {
		select {
		case <-l.Failed():
			return l.Err()
		case <-gctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		<-gctx.Done()
		notify(log, daemon.SdNotifyStopping)
		servers.stop()
		return nil
	})
	log.Info("gateway is ready", "listen", fmt.Sprint(cfg.Listen), "data_dir", cfg.DataDir)
	notify(log, daemon.SdNotifyReady)
	if err := g.Wait(); err != nil {
		return err
	}
	log.Info("gateway has stopped")
	return nil
}

// makeDir makes the data directory so that it outlives a power failure: the
// ledger syncs what is in it, not its own name.
func makeDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}

// notify tells systemd. It is not there to be told on a developer's machine.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd was not notified", "state", state, "err", err)
	}
}

// servers are the same services twice: plain for unix sockets, with TLS for tcp.
type servers struct {
	plain, tls *grpc.Server // tls is nil if no address is tcp
	health     *health.Server
	stopping   chan struct{} // closed by stop
}

func newServers(cfg config.Config, l *ledger.Ledger, log *slog.Logger) (*servers, error) {
	s := &servers{health: health.NewServer(), stopping: make(chan struct{})}
	usage := ingest.New(l, s.stopping, log)
	queries := query.New(l, cfg.TLS.Operators)
	build := func(creds credentials.TransportCredentials) *grpc.Server {
		server := grpc.NewServer(
			grpc.Creds(creds),
			grpc.MaxRecvMsgSize(ingest.MaxMessageBytes),
			grpc.MaxConcurrentStreams(16), // per connection; a node needs two
			grpc.MaxHeaderListSize(16<<10),
			grpc.ConnectionTimeout(10*time.Second),
			grpc.WaitForHandlers(true), // the ledger is closed after the last
			// A node that vanished frees its stream within a minute.
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
			grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		)
		usagev1.RegisterUsageServer(server, usage)
		gatewayv1.RegisterGatewayServer(server, queries)
		healthv1.RegisterHealthServer(server, s.health)
		return server
	}
	s.plain = build(insecure.NewCredentials())
	if cfg.TLS.CertFile != "" {
		creds, err := newCertificates(cfg.TLS, log)
		if err != nil {
			return nil, err
		}
		s.tls = build(credentials.NewTLS(creds.config()))
	}
	return s, nil
}

func (s *servers) of(a config.Address) *grpc.Server {
	if a.Network == "unix" {
		return s.plain
	}
	return s.tls
}

// stop lets calls under way end, then cuts off those that do not.
func (s *servers) stop() {
	s.health.Shutdown()
	close(s.stopping)
	cut := time.AfterFunc(stopGrace, func() {
		s.plain.Stop()
		if s.tls != nil {
			s.tls.Stop()
		}
	})
	defer cut.Stop()
	s.plain.GracefulStop()
	if s.tls != nil {
		s.tls.GracefulStop()
	}
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}
