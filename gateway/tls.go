// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"

	"github.com/bulkheadhq/bulkhead/gateway/config"
)

// certificates are the gateway's own and the CA of its callers. They are short
// lived, so files that changed are read again at the next handshake; if the new
// ones cannot be used, the old ones stay in use and the log says so.
type certificates struct {
	files config.TLS
	log   *slog.Logger

	mu      sync.Mutex
	stamp   [3]stamp    // +checklocks:mu
	current *tls.Config // +checklocks:mu
}

// stamp tells two states of a file apart.
type stamp struct {
	inode fs.FileInfo
	err   string
}

func (s stamp) same(o stamp) bool {
	if s.inode == nil || o.inode == nil {
		return s.inode == o.inode && s.err == o.err
	}
	return os.SameFile(s.inode, o.inode) && s.inode.Size() == o.inode.Size() && s.inode.ModTime().Equal(o.inode.ModTime())
}

func newCertificates(files config.TLS, log *slog.Logger) (*certificates, error) {
	c := &certificates{files: files, log: log}
	c.stamp = c.look()
	var err error
	c.current, err = c.load()
	return c, err
}

// config asks for the current files at every handshake.
func (c *certificates) config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.latest(), nil },
	}
}

func (c *certificates) latest() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.look()
	for i := range now {
		if !now[i].same(c.stamp[i]) {
			c.stamp = now
			fresh, err := c.load()
			if err != nil {
				c.log.Error("changed certificates cannot be used; the old ones stay", "err", err)
				break
			}
			c.current = fresh
			c.log.Info("certificates were read again")
			break
		}
	}
	return c.current
}

func (c *certificates) look() (out [3]stamp) {
	for i, path := range []string{c.files.CertFile, c.files.KeyFile, c.files.ClientCAFile} {
		info, err := os.Stat(path)
		out[i].inode = info
		if err != nil {
			out[i].err = err.Error()
		}
	}
	return out
}

func (c *certificates) load() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(c.files.CertFile, c.files.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tls.cert_file %s, tls.key_file %s: %w", c.files.CertFile, c.files.KeyFile, err)
	}
	pem, err := os.ReadFile(c.files.ClientCAFile)
	if err != nil {
		return nil, fmt.Errorf("tls.client_ca_file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls.client_ca_file %s: no PEM certificate", c.files.ClientCAFile)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"h2"},
		// A resumed session would not be checked against a changed CA.
		SessionTicketsDisabled: true,
	}, nil
}
